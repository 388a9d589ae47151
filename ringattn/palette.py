"""Colours and markers of lines in plots. Readers with colour-blindness can tell them apart."""

BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#E69F00", "#009E73", "#CC79A7"
VERMILION, SKY, BLACK = "#D55E00", "#56B4E9", "#000000"
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, VERMILION, SKY, BLACK)
"""Okabe and Ito's palette (https://jfly.uni-koeln.de/color), without yellow, which is faint on white."""
MARKERS = "osD^vPX*<>h"
