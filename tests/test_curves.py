"""Matplotlib figures of memory, reach and overlap."""

import numpy as np
from matplotlib.patches import Rectangle

from ringattn.visualize import memory_figure, overlap_figure, reach_figure

CURVES = {"dense": {2**14: 2**37, 2**16: 2**41}, "ring": {2**14: 2**27, 2**16: 2**29}}


def test_a_memory_figure_shows_the_curves():
    axes = memory_figure(CURVES, "tokens of the row", {"a chip": 2**34}).axes[0]
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("tokens of the row", "temporary memory per device")
    assert axes.get_title()
    lines = {str(line.get_label()): line for line in axes.lines}
    for name, curve in CURVES.items():
        np.testing.assert_array_equal(lines[name].get_xydata(), list(curve.items()))
    np.testing.assert_array_equal(lines["a chip"].get_ydata(), 2**34)
    ring = memory_figure({"ring": {2: 2**29, 8: 2**29}}, "devices", logarithmic=False).axes[0]
    assert ring.get_yscale() == "linear"
    assert ring.get_ylim()[0] == 0
    assert ring.lines[0].get_color() == lines["ring"].get_color(), "a strategy has its colour in all figures"
    assert [ring.xaxis.get_major_formatter()(x, None) for x in ring.get_xticks()] == ["2", "8"]


def test_a_reach_figure_marks_what_is_extrapolated():
    reach = {"gather": {2: 100.0, 8: 200.0, 64: 250.0}, "ring": {2: 100.0, 8: 400.0, 64: 3200.0}}
    axes = reach_figure(reach, 8, "in 1 GiB").axes[0]
    compiled, beyond = ([line for line in axes.lines if line.get_linestyle() == style] for style in ("-", "--"))
    assert [line.get_label() for line in compiled] == ["gather", "ring"]
    assert str(beyond[-1].get_label()) == "beyond 8 devices: extrapolated by the law"
    np.testing.assert_array_equal(compiled[1].get_xydata(), [(2, 100), (8, 400)])
    np.testing.assert_array_equal(beyond[0].get_xydata(), [(8, 200), (64, 250)])
    assert axes.get_title() == "in 1 GiB"


def test_an_overlap_figure_has_one_bar_per_chip_and_kind():
    axes = overlap_figure({"slow": {"plain": 500.0, "half": 1000.0}, "fast": {"plain": 1200.0, "half": 2400.0}}).axes[0]
    boxes = [bar.get_bbox() for bar in axes.patches if isinstance(bar, Rectangle)]
    widths = sorted((round((box.y0 + box.y1) / 2, 1), round(box.width)) for box in boxes)
    assert widths == [(-0.2, 500), (0.2, 1000), (0.8, 1200), (1.2, 2400)]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["slow", "fast"]
    assert {text.get_text() for text in axes.texts} == {"500", "1,000", "1,200", "2,400"}
    assert axes.get_xlabel() == "local tokens"
    assert axes.get_title()
