"""The quickstart with tokens sharded in their natural order: an ablation of the zigzag layout.

    python scripts/train.py --config configs/layout_contiguous.py

Expect the losses of the quickstart, up to rounding: a layout changes where tokens are stored, not what they attend to.
Work is unbalanced: queries on the last device attend to all shards, those on the first device only to their own, and
the slowest device determines the step time.
"""

from dataclasses import replace

from quickstart import config as quickstart

config = replace(
    quickstart,
    name="layout_contiguous",
    attention=replace(quickstart.attention, layout="contiguous"),
)
