"""Owners of K/V shards by hop, visible pairs, and work per device and hop."""

import math
from dataclasses import replace

import jax
import numpy as np
import pytest

from ringattn.attn.kernels.protocol import KV, LogitSpec, Queries
from ringattn.attn.mask import Mask, Tokens
from ringattn.attn.positions import ImpliedPositions
from ringattn.attn.ring import Ring
from ringattn.attn.softmax import Partial
from ringattn.layout import LAYOUTS
from ringattn.visualize import (
    Row,
    compute_time,
    dense_mask,
    imbalance,
    kv_owners,
    pairs_per_hop,
    sent_hops,
    token_owners,
)


def two_documents(length: int) -> np.ndarray:
    """Ids of two documents: the first quarter of the tokens, and the rest."""
    return np.repeat(np.array([0, 1], np.int32), [length // 4, 3 * length // 4])


@pytest.mark.parametrize("devices", range(3, 9))
def test_every_device_computes_with_every_shard_once(devices):
    for device, owners in enumerate(kv_owners(devices)):
        assert owners[0] == device
        assert sorted(owners) == list(range(devices))
    for hop_owners in zip(*kv_owners(devices), strict=True):
        assert sorted(hop_owners) == list(range(devices)), "a shard is on one device at a time"


class AppendOwner:
    """A kernel that appends the owner of its K/V shard to its result, one decimal digit per hop."""

    def forward(self, spec, queries, kv, slopes, carry, dtype=None):
        return carry._replace(out=10 * carry.out + kv.key)

    def backward(self, spec, queries, kv, slopes, residuals, carry, dtype=None):
        raise NotImplementedError


def test_the_ring_follows_the_schedule(make_mesh):
    implied = ImpliedPositions("contiguous", shards=4, local_queries=1, local_keys=1)
    ring = Ring("context", AppendOwner(), implied)
    tokens = Tokens(np.zeros((1, 1), np.int32))

    def owners_by_hop(owner):
        empty = Partial(0 * owner, owner[..., 0])
        queries, keys = Queries(owner[None], tokens), KV(owner, owner, tokens)
        return ring.forward(LogitSpec(Mask(), 1.0), queries, keys, None, empty).out

    spec = jax.P(None, None, "context")
    with jax.set_mesh(make_mesh(context=4)):
        owners = jax.device_put(np.arange(1, 5, dtype=np.float32)[None, None, :, None], spec)
        digits = jax.shard_map(owners_by_hop, in_specs=spec, out_specs=spec)(owners)
    expected = [sum((owner + 1) * 10 ** (3 - hop) for hop, owner in enumerate(row)) for row in kv_owners(4)]
    np.testing.assert_array_equal(np.ravel(digits), np.array(expected, np.float32))


def test_token_owners_follow_the_layout():
    assert token_owners(4, "contiguous") == [0, 0, 1, 1, 2, 2, 3, 3]
    assert token_owners(4, "striped") == [0, 1, 2, 3, 0, 1, 2, 3]
    assert token_owners(4, "zigzag") == [0, 1, 2, 3, 3, 2, 1, 0]


def test_causal_work_is_balanced_in_zigzag():
    row = Row(512, 8, "zigzag")
    assert imbalance(row) == 1
    half = row.local // 2
    work = pairs_per_hop(row)
    np.testing.assert_array_equal(work[:, 1:], 2 * half**2)
    np.testing.assert_array_equal(work[:, 0], row.local * (row.local + 1) // 2)


def test_causal_work_in_contiguous_and_striped():
    p, c = 8, 64
    triangle, smaller_triangle = c * (c + 1) // 2, c * (c - 1) // 2
    for device, hop in np.ndindex(p, p):
        contiguous = triangle if hop == 0 else c * c * (hop <= device)
        striped = triangle if hop <= device else smaller_triangle
        assert pairs_per_hop(Row(p * c, p, "contiguous"))[device, hop] == contiguous
        assert pairs_per_hop(Row(p * c, p, "striped"))[device, hop] == striped
    time, balanced_time = compute_time(Row(p * c, p, "contiguous"))
    assert time == pytest.approx(triangle / c**2 + p - 1)
    assert balanced_time == pytest.approx(triangle / c**2 + (p - 1) / 2)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_visible_pair_is_computed_once(layout):
    ids, spans = two_documents(64), np.where(np.arange(64) < 10, 0, -1).astype(np.int32)
    for row in (
        Row(64, 4, layout),
        Row(64, 4, layout, Mask(causal=False)),
        Row(64, 4, layout, Mask(window=(9, 0))),
        Row(64, 4, layout, segment_ids=ids),
        Row(64, 4, layout, span_ids=spans),
    ):
        natural = dense_mask(replace(row, layout="contiguous"))
        assert pairs_per_hop(row).sum() == dense_mask(row).sum() == natural.sum()
    assert natural[0, 9]
    assert not natural[0, 10]
    documents = dense_mask(Row(64, 4, segment_ids=ids))
    assert documents.sum() == 16 * 17 // 2 + 48 * 49 // 2


@pytest.mark.parametrize("left", [1, 15, 16, 17, 32, 33, 100])
def test_hops_beyond_a_window_are_not_sent(left):
    row = Row(128, 8, mask=Mask(window=(left, 0)))
    sent = sent_hops(row)
    assert len(sent) == math.ceil(left / row.local)
    skipped = [hop for hop in range(1, 8) if hop not in sent]
    assert not pairs_per_hop(row)[:, skipped].any()
    assert pairs_per_hop(row)[:, list(sent)].any(0).all()


def test_a_two_sided_window_needs_hops_in_both_directions():
    assert sent_hops(Row(128, 8, mask=Mask(causal=False, window=16))) == (1, 7)
    spans = np.zeros(128, np.int32)
    assert sent_hops(Row(128, 8, mask=Mask(window=16), span_ids=spans)) == (1, 7), "spans see later tokens"
    assert sent_hops(Row(128, 8, span_ids=spans)) == tuple(range(1, 8))


def test_a_hop_takes_as_long_as_its_slowest_device():
    """One document fills device 0, another has 8 tokens on each of devices 2 and 3; other tokens are alone."""
    ids = np.arange(64, dtype=np.int32)
    ids[:16], ids[40:56] = 0, 40
    row = Row(64, 4, segment_ids=ids)
    np.testing.assert_array_equal(pairs_per_hop(row)[:, 0], [136, 16, 44, 44])
    np.testing.assert_array_equal(pairs_per_hop(row)[:, 1], [0, 0, 0, 64])
    time, balanced_time = compute_time(row)
    assert time == pytest.approx((136 + 64) / 256)
    assert balanced_time == pytest.approx((136 + 16 + 44 + 44 + 64) / 4 / 256)
    assert imbalance(row) == pytest.approx(time / balanced_time)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"length": 100}, "112"),
        ({"segment_ids": np.zeros(3, np.int32)}, r"segment_ids.shape=\(3,\) must be \(64,\)"),
        ({"layout": "x"}, "'x'"),
        ({"tile": 3}, "tile=3 must divide the 8 tokens per device; use 1 or 8"),
    ],
)
def test_a_row_that_does_not_fit_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Row(**({"length": 64, "shards": 8, "layout": "zigzag"} | wrong))


def test_tiles_are_computed_in_full_or_not_at_all():
    p, c, tile = 4, 16, 4
    work = pairs_per_hop(Row(p * c, p, "contiguous", tile=tile))
    np.testing.assert_array_equal(work[:, 0], tile**2 * (c // tile) * (c // tile + 1) // 2)
    np.testing.assert_array_equal(work[:, 1], [0, c * c, c * c, c * c])
    assert imbalance(Row(p * c, p, "zigzag", tile=tile)) == 1
    documents = Row(p * c, p, "striped", segment_ids=two_documents(p * c), tile=c)
    assert (pairs_per_hop(documents) == c * c).all(), "a tile of striped tokens spans the whole row"
