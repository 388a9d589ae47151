from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringattn.attention.mask import Mask, Tokens, extent, needed_hops, relate, visible
from ringattn.layout import LAYOUTS, shard_positions

SIDES = st.integers(0, 12)
WINDOWS = st.none() | SIDES | st.tuples(SIDES, SIDES)
MASKS = st.builds(Mask, causal=st.booleans(), window=WINDOWS, chunk=st.none() | st.integers(1, 12))


def sees(mask: Mask, i: int, j: int, segments: tuple[int, int] = (0, 0), spans: tuple[int, int] = (-1, -1)) -> bool:
    """The definition, of one query at position i and one key at position j."""
    left, right = mask.window if isinstance(mask.window, tuple) else (mask.window, mask.window)
    if segments[0] != segments[1] or segments[0] < 0:
        return False
    if mask.causal and j > i and not (spans[0] == spans[1] and spans[0] >= 0):
        return False
    if (left is not None and j < i - left) or (right is not None and j > i + right):
        return False
    return mask.chunk is None or i // mask.chunk == j // mask.chunk


@st.composite
def tokens(draw, count: int, ids: bool):
    """Tokens with any positions and ids; few values, so that they often agree."""

    def values(low: int, high: int) -> np.ndarray:
        return np.array(draw(st.lists(st.integers(low, high), min_size=count, max_size=count)), np.int32)

    return Tokens(values(0, 25), values(-1, 2) if ids else None, values(-1, 2) if ids else None)


@st.composite
def two_tiles(draw):
    ids = draw(st.booleans())
    return draw(tokens(3, ids)), draw(tokens(4, ids))


def brute_force(mask: Mask, q: Tokens, k: Tokens) -> np.ndarray:
    def pair(ids_q, ids_k, a: int, b: int, default: int) -> tuple[int, int]:
        return (default, default) if ids_q is None else (ids_q[a], ids_k[b])

    return np.array(
        [
            [
                sees(mask, i, j, pair(q.segments, k.segments, a, b, 0), pair(q.spans, k.spans, a, b, -1))
                for b, j in enumerate(k.positions)
            ]
            for a, i in enumerate(q.positions)
        ]
    )


@settings(deadline=None, max_examples=200)
@given(MASKS, two_tiles())
def test_visible_is_the_definition_and_relate_never_claims_too_much(mask, tiles):
    q, k = tiles
    seen = brute_force(mask, q, k)
    np.testing.assert_array_equal(visible(mask, q, k), seen)
    empty, full = relate(mask, extent(q), extent(k))
    assert not (empty and seen.any())
    assert not (full and not seen.all())


@settings(deadline=None, max_examples=60)
@given(MASKS, st.sampled_from([(1, 3), (4, 4), (8, 3)]), st.lists(st.integers(0, 9), min_size=8, max_size=12))
def test_relate_is_exact_for_the_tiles_of_a_packed_row(mask, sizes, lengths):
    size_q, size_k = sizes
    segments = np.repeat(np.arange(len(lengths) + 1), [*lengths, 24])[:24].astype(np.int32)
    row = Tokens(jnp.arange(24, dtype=jnp.int32), jnp.asarray(segments))
    # Extents [tiles, 1] and [1, tiles]: one call compares all with all.
    q = jax.tree.map(lambda x: x[:, None], extent(jax.tree.map(lambda x: x.reshape(-1, size_q), row)))
    k = jax.tree.map(lambda x: x[None], extent(jax.tree.map(lambda x: x.reshape(-1, size_k), row)))
    seen = np.asarray(visible(mask, row, row)).reshape(24 // size_q, size_q, 24 // size_k, size_k)
    empty, full = (np.broadcast_to(x, seen.shape[::2]) for x in relate(mask, q, k))
    np.testing.assert_array_equal(empty, ~seen.any((1, 3)))
    np.testing.assert_array_equal(full, seen.all((1, 3)))


@settings(deadline=None, max_examples=150)
@given(
    mask=MASKS,
    layout=st.sampled_from(LAYOUTS),
    members=st.integers(1, 6),
    group=st.integers(1, 3),
    half=st.integers(1, 4),
    fewer=st.integers(0, 3),
)
def test_needed_hops_against_all_pairs_of_tokens(mask, layout, members, group, half, fewer):
    shards, keys = members * group, 2 * half
    queries = max(keys - 2 * fewer, 2)

    def held(local: int, ahead: int = 0) -> np.ndarray:
        shard = [shard_positions(layout, shard, shards, local) + ahead for shard in range(shards)]
        return np.concatenate(shard).reshape(members, -1)

    i_of, j_of = held(queries, shards * (keys - queries)), held(keys)
    exact = {
        hop
        for hop in range(1, members)
        if any(sees(mask, i, j) for member in range(members) for i in i_of[member] for j in j_of[member - hop])
    }
    needed = needed_hops(mask, layout, shards, queries, keys, group)
    assert needed >= exact
    if mask.chunk is None:
        assert needed == exact


@pytest.mark.parametrize(
    ("left", "hops"), [(0, 0), (1, 1), (511, 1), (512, 1), (513, 2), (1000, 2), (1024, 2), (1025, 3)]
)
def test_a_causal_window_needs_as_many_hops_as_shards_it_reaches(left, hops):
    assert needed_hops(Mask(window=(left, 0)), "contiguous", 8, 512, 512) == set(range(1, hops + 1))
    assert needed_hops(Mask(window=left), "contiguous", 8, 512, 512) == set(range(1, hops + 1))
    both_ways = set(range(1, hops + 1)) | set(range(8 - hops, 8))
    assert needed_hops(Mask(causal=False, window=left), "contiguous", 8, 512, 512) == both_ways


def test_a_chunk_of_a_prefill_needs_the_hops_that_reach_its_keys():
    # The last 64 of 4,096 tokens, 8 a shard: under a window they see the last shard's keys alone.
    window = Mask(window=(100, 0))
    assert needed_hops(Mask(), "contiguous", 8, 8, 512) == set(range(1, 8))
    assert needed_hops(window, "contiguous", 8, 8, 512) == set(range(1, 8))  # each shard holds some of them
    assert needed_hops(window, "contiguous", 8, 512, 512) == {1}


def test_all_hops_are_needed_where_every_shard_sees_every_other():
    for layout in LAYOUTS:
        assert needed_hops(Mask(), layout, 8, 512, 512) == set(range(1, 8))


def test_chunks_that_do_not_cross_shards_need_no_hops():
    assert needed_hops(Mask(chunk=512), "contiguous", 8, 512, 512) == set()
    assert needed_hops(Mask(chunk=1024), "contiguous", 8, 512, 512) == {1}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"window": -1}, "window=-1 must be an int from 0 to"),
        ({"window": (3, -2)}, r"window=\(3, -2\) must be .* or two, \(left, right\)"),
        ({"chunk": 0}, "chunk=0 must be from 1 to .*; None for no chunks"),
    ],
)
def test_a_mask_that_means_nothing_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Mask(**wrong)


def test_a_window_of_any_size_and_positions_of_any_size_do_not_wrap():
    far = Tokens(jnp.asarray([[2**31 - 3, 2**31 - 2]], jnp.int32))
    near = Tokens(jnp.asarray([[0, 1]], jnp.int32))
    for tokens in (far, near):
        for mask in (Mask(causal=False, window=2**31 - 2), Mask(causal=False, window=(5, 2**31 - 2))):
            assert np.asarray(visible(mask, tokens, tokens)).all()
            empty, full = relate(mask, extent(tokens), extent(tokens))
            assert (bool(empty.all()), bool(full.all())) == (False, True)
    with pytest.raises(ValueError, match="window=2147483648 must be an int from 0 to 2147483646"):
        Mask(window=2**31)


def test_a_mask_of_other_ints_is_the_same_mask(unchecked):
    given: Any = np.int64(5)
    pair: Any = [5, 0]
    assert Mask(window=given) == Mask(window=5)
    assert hash(Mask(window=pair)) == hash(Mask(window=(5, 0)))
