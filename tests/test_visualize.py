"""The picture of the ring says what the ring does."""

import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from ringattn.attention.kernels import Keys, Queries, Rule
from ringattn.attention.mask import Mask, Tokens
from ringattn.attention.ring import Ring
from ringattn.attention.softmax import Partial
from ringattn.layout import LAYOUTS
from ringattn.visualize import COLOURS, draw, owners, visitors

ROOT = Path(__file__).parents[1]


def test_the_committed_picture_is_what_the_code_draws():
    committed = (ROOT / "notebooks" / "images" / "ring.svg").read_text(encoding="utf-8")
    assert committed == draw(), "draw it again: python -m ringattn.visualize notebooks/images/ring.svg"


@pytest.mark.parametrize("devices", range(3, 9))
def test_every_query_sees_every_shard_exactly_once(devices):
    for device, row in enumerate(visitors(devices)):
        assert row[0] == device
        assert sorted(row) == list(range(devices))
    for column in zip(*visitors(devices), strict=True):
        assert sorted(column) == list(range(devices)), "a shard is at one device at a time"


def test_the_schedule_is_that_of_the_ring(make_mesh):
    """A kernel that writes down, digit after digit, whose keys it is given."""

    def write(rule, queries, keys, slopes, part):
        return part._replace(out=10 * part.out + keys.key)

    ring = Ring("context", "contiguous", SimpleNamespace(forward=write))
    nowhere = Tokens(np.zeros((1, 1), np.int32))

    def visits(home):
        nothing = Partial(0 * home, home[..., 0])
        return ring.forward(
            Rule(Mask(), 1.0), Queries(home[None], nowhere), Keys(home, home, nowhere), None, nothing
        ).out

    spread = jax.P(None, None, "context")
    with jax.set_mesh(make_mesh(context=4)):
        homes = jax.device_put(np.arange(1, 5, dtype=np.float32)[None, None, :, None], spread)
        written = jax.shard_map(visits, in_specs=spread, out_specs=spread)(homes)
    expected = [sum((home + 1) * 10 ** (3 - hop) for hop, home in enumerate(row)) for row in visitors(4)]
    np.testing.assert_array_equal(np.ravel(written), np.array(expected, np.float32))


def test_the_owners_of_tokens_are_those_of_the_layout():
    assert owners(4, "contiguous") == [0, 0, 1, 1, 2, 2, 3, 3]
    assert owners(4, "striped") == [0, 1, 2, 3, 0, 1, 2, 3]
    assert owners(4, "zigzag") == [0, 1, 2, 3, 3, 2, 1, 0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_bars_fill_up_with_the_visits(layout):
    """Of the d shards that a device has seen after hop d - 1, 2 d tokens are coloured; a token of each is two wide."""
    devices = 4
    bars = Counter(re.findall(r'height="11.0" fill="(#\w+)"', draw(devices, layout)))
    coloured = devices * sum(2 * seen for seen in range(1, devices + 1))
    assert sum(bars.values()) == devices * devices * 2 * devices
    assert sum(bars[colour] for colour in COLOURS) == coloured
    assert len({bars[colour] for colour in COLOURS[:devices]}) == 1, "no shard is seen more often than another"


@pytest.mark.parametrize(("devices", "layout", "message"), [(9, "zigzag", "devices=9"), (4, "spiral", "'spiral'")])
def test_what_cannot_be_drawn(devices, layout, message):
    with pytest.raises(ValueError, match=message):
        draw(devices, layout)
