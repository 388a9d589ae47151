"""The quickstart with a sliding window: a token attends to itself and the 256 preceding tokens.

    python scripts/train.py --config configs/window.py

A device stores 256 tokens of a row of 2,048, so in the contiguous layout the window reaches at most one device back,
and K/V need one hop instead of seven. The increase in loss over the quickstart measures the value of longer context.
"""

from dataclasses import replace

from quickstart import config as quickstart

config = replace(
    quickstart,
    name="window",
    model=replace(quickstart.model, window=256),
    attention=replace(quickstart.attention, layout="contiguous"),
)
