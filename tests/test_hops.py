"""Needed distances, by brute force over all pairs of tokens, and the shortest runs that reach them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_mask import MASKS, sees

from ringattn.attn.hops import hop_runs, needed_distances, plan_hops
from ringattn.attn.mask import Mask
from ringattn.attn.positions import ImpliedPositions
from ringattn.layout import LAYOUTS, shard_positions


@settings(deadline=None, max_examples=150)
@given(
    mask=MASKS,
    layout=st.sampled_from(LAYOUTS),
    members=st.integers(1, 6),
    shards_per_member=st.integers(1, 3),
    half=st.integers(1, 4),
    fewer=st.integers(0, 3),
)
def test_needed_distances_agree_with_all_pairs_of_tokens(mask, layout, members, shards_per_member, half, fewer):
    shards, keys = members * shards_per_member, 2 * half
    queries = max(keys - 2 * fewer, 2)

    def member_positions(local: int, offset: int = 0) -> np.ndarray:
        positions = [shard_positions(layout, shard, shards, local) + offset for shard in range(shards)]
        return np.concatenate(positions).reshape(members, -1)

    q, k = member_positions(queries, shards * (keys - queries)), member_positions(keys)
    exact = {
        distance
        for distance in range(1, members)
        if any(sees(mask, i, j) for member in range(members) for i in q[member] for j in k[member - distance])
    }
    needed = needed_distances(mask, layout, shards, queries, keys, shards_per_member)
    assert needed >= exact
    if mask.chunk is None:
        assert needed == exact


@pytest.mark.parametrize(
    ("left", "hops"), [(0, 0), (1, 1), (511, 1), (512, 1), (513, 2), (1000, 2), (1024, 2), (1025, 3)]
)
def test_a_causal_window_needs_one_hop_per_shard_it_reaches(left, hops):
    assert needed_distances(Mask(window=(left, 0)), "contiguous", 8, 512, 512) == set(range(1, hops + 1))
    assert needed_distances(Mask(window=left), "contiguous", 8, 512, 512) == set(range(1, hops + 1))
    both_ways = set(range(1, hops + 1)) | set(range(8 - hops, 8))
    assert needed_distances(Mask(causal=False, window=left), "contiguous", 8, 512, 512) == both_ways


def test_hops_of_a_prefill_chunk():
    # The queries are the last 64 of 4,096 tokens, 8 per shard. Under the window they see keys of the last shard only.
    window = Mask(window=(100, 0))
    assert needed_distances(Mask(), "contiguous", 8, 8, 512) == set(range(1, 8))
    assert needed_distances(window, "contiguous", 8, 8, 512) == set(range(1, 8))  # every shard holds some queries
    assert needed_distances(window, "contiguous", 8, 512, 512) == {1}


def test_causal_attention_needs_all_hops():
    for layout in LAYOUTS:
        assert needed_distances(Mask(), layout, 8, 512, 512) == set(range(1, 8))


def test_chunks_within_a_shard_need_no_hops():
    assert needed_distances(Mask(chunk=512), "contiguous", 8, 512, 512) == set()
    assert needed_distances(Mask(chunk=1024), "contiguous", 8, 512, 512) == {1}


@given(
    st.integers(1, 12).flatmap(
        lambda n: st.tuples(st.just(n), st.sets(st.integers(1, n - 1) if n > 1 else st.nothing()))
    )
)
def test_runs_reach_all_needed_distances_with_the_fewest_hops(case):
    members, needed = case
    runs = plan_hops(needed, members)
    reached = [direction * hop % members for direction, hops in runs for hop in range(1, hops + 1)]
    assert needed <= set(reached)
    assert len(reached) == len(set(reached))
    assert 0 not in reached
    both_ways = [
        ahead + back
        for ahead in range(members)
        for back in range(members - ahead)
        if needed <= set(range(1, ahead + 1)) | set(range(members - back, members))
    ]
    assert len(reached) == min(both_ways)


@pytest.mark.parametrize(
    ("needed", "runs"),
    [
        (range(1, 8), ((1, 7),)),
        ((), ()),
        ((1, 2), ((1, 2),)),
        ((6, 7), ((-1, 2),)),
        ((1, 2, 7), ((1, 2), (-1, 1))),
    ],
)
def test_runs_by_example(needed, runs):
    assert plan_hops(needed, 8) == runs


def test_spans_reach_ahead_and_given_positions_need_all_hops():
    mask, implied = Mask(window=(512, 512)), ImpliedPositions("contiguous", 8, 512, 512)
    assert hop_runs(mask, False, implied, 8) == ((1, 1),)
    assert hop_runs(mask, True, implied, 8) == ((1, 1), (-1, 1))
    assert hop_runs(mask, False, None, 8) == ((1, 7),)
