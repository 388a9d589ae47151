"""The quickstart with a sliding window: a token sees itself and the 256 tokens before it.

    python scripts/train.py --config configs/window.py

A device holds 256 tokens of a row of 2,048, so in the contiguous layout no window reaches further than one device
back: K/V make one hop instead of seven. How far its loss lies above the quickstart's is what the farther past is worth.
"""

from dataclasses import replace

from quickstart import config as quickstart

config = replace(
    quickstart,
    name="window",
    attention=replace(quickstart.attention, layout="contiguous", window=256),
)
