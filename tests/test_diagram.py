"""The static SVG picture of the ring."""

import re
from collections import Counter

import pytest

from ringattn.layout import LAYOUTS
from ringattn.visualize import COLOURS, draw


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bars_show_the_attended_keys(layout):
    """After hop h a device has attended to h + 1 shards, so 2 (h + 1) of its bar's 2p tokens are coloured."""
    devices = 4
    bars = Counter(re.findall(r'height="11.0" fill="(#\w+)"', draw(devices, layout)))
    coloured = devices * sum(2 * shards for shards in range(1, devices + 1))
    assert sum(bars.values()) == devices * devices * 2 * devices
    assert sum(bars[colour] for colour in COLOURS) == coloured
    assert len({bars[colour] for colour in COLOURS[:devices]}) == 1, "all shards are attended to equally often"


@pytest.mark.parametrize(
    ("devices", "layout", "message"), [(9, "zigzag", "devices=9 must be from 3 to 8"), (4, "spiral", "'spiral'")]
)
def test_a_ring_that_cannot_be_drawn_is_refused(devices, layout, message):
    with pytest.raises(ValueError, match=message):
        draw(devices, layout)
