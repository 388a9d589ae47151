"""The quickstart with rows cut into eight pieces in their natural order: an ablation of the layout.

    python scripts/train.py --config configs/layout_contiguous.py

Expect the quickstart's losses, up to rounding: a layout changes where tokens lie, not what they see. What differs is
balance: the last device's queries see all keys, the first one's almost none, and the slowest device sets the pace.
"""

from dataclasses import replace

from quickstart import config as quickstart

config = replace(
    quickstart,
    name="layout_contiguous",
    attention=replace(quickstart.attention, layout="contiguous"),
)
