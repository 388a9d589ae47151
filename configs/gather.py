"""The quickstart with K/V all-gathered on every device, as a baseline for the ring.

    python scripts/train.py --config configs/gather.py

Expect the losses of the quickstart, up to rounding. Every device stores the K/V of the whole row for one layer at a
time, so memory grows with the row length instead of the local length. In return, each layer needs one collective
instead of seven hops.
"""

from dataclasses import replace

from quickstart import config as quickstart

config = replace(
    quickstart,
    name="gather",
    attention=replace(quickstart.attention, strategy="gather"),
)
