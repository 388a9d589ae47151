"""The quickstart with all keys and values gathered on every device: what the ring is compared with.

    python scripts/train.py --config configs/gather.py

Expect the quickstart's losses, up to rounding. Every device holds the whole row's K/V of a layer at once, so memory
grows with the row's length and not only with a device's part of it; in return there is one exchange a layer.
"""

from dataclasses import replace

from quickstart import config as quickstart

config = replace(
    quickstart,
    name="gather",
    attention=replace(quickstart.attention, strategy="gather"),
)
