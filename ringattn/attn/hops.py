"""Determines the hops of a ring from the mask and the layout, at trace time.

A member of a ring is one device, or all devices of the inner axis in a nested ring; it holds one or more consecutive
shards. A run is a sequence of hops in one direction, starting from the local shard.
"""

from collections.abc import Collection
from dataclasses import replace
from functools import lru_cache

import numpy as np
from jaxtyping import Bool

from ringattn.attn.mask import Mask
from ringattn.attn.positions import ImpliedPositions
from ringattn.layout import Piece, pieces


def hop_runs(mask: Mask, spans: bool, implied: ImpliedPositions | None, members: int) -> tuple[tuple[int, int], ...]:
    """Returns the runs of a ring of `members` as (direction, hops): see `plan_hops`.

    Makes every hop if `implied` is None, because the positions are then unknown at trace time. With spans, `causal`
    excludes no hop: a span can make any later key visible.
    """
    if implied is None:
        return plan_hops(range(1, members), members)
    mask = replace(mask, causal=mask.causal and not spans)
    lengths = implied.local_queries, implied.local_keys
    needed = needed_distances(mask, implied.layout, implied.shards, *lengths, implied.shards // members)
    return plan_hops(needed, members)


@lru_cache
def needed_distances(
    mask: Mask, layout: str, shards: int, local_queries: int, local_keys: int, shards_per_member: int = 1
) -> frozenset[int]:
    """Returns the distances h > 0 for which some member r of the ring sees a key of member r - h.

    Exact for positions that `layout` implies, except with `chunk`: chunks are compared by a piece's first and last
    token, which may keep a distance at which no key is visible.

    Args:
      mask: evaluated without spans. With spans, pass causal=False, as `hop_runs` does.
      layout: "contiguous", "striped" or "zigzag"; it must divide both lengths (`layout.check_length`).
      shards: number of shards of the sequence, a multiple of `shards_per_member`.
      local_queries, local_keys: tokens per shard. The queries are the last tokens of the sequence.
      shards_per_member: number of consecutive shards per member of the ring.
    """
    members = np.arange(shards).reshape(-1, shards_per_member)

    def member_pieces(members: np.ndarray, local: int, offset: int = 0) -> list[Piece]:
        unshifted = (piece for column in members.T for piece in pieces(layout, column, shards, local))
        return [piece._replace(start=piece.start + offset) for piece in unshifted]

    q_pieces, needed = member_pieces(members, local_queries, shards * (local_keys - local_queries)), set()
    for distance in range(1, len(members)):
        kv_pieces = member_pieces(np.roll(members, distance, axis=0), local_keys)
        if any(_any_visible(mask, q, k).any() for q in q_pieces for k in kv_pieces):
            needed.add(distance)
    return frozenset(needed)


def _any_visible(mask: Mask, q: Piece, k: Piece) -> Bool[np.ndarray, " members"]:
    """Returns, per member, True if a query of piece q sees a key of piece k. Both pieces have the same step."""
    # p_i - p_j takes the values start + step * m for -behind <= step * m <= ahead. The keys are visible if one of these
    # values is within the mask's bounds [low, high].
    start, step, behind, ahead = q.start - k.start, q.step, q.step * (k.count - 1), q.step * (q.count - 1)
    low = np.maximum(start - behind, 0 if mask.causal else start - behind)
    low = low if mask.right is None else np.maximum(low, -mask.right)
    high = start + ahead if mask.left is None else np.minimum(start + ahead, mask.left)
    smallest = start + -(-(low - start) // step) * step  # smallest reachable difference >= low
    any_visible = smallest <= high
    if mask.chunk is not None:
        any_visible &= (q.start // mask.chunk <= (k.start + behind) // mask.chunk) & (
            k.start // mask.chunk <= (q.start + ahead) // mask.chunk
        )
    return any_visible


def plan_hops(needed: Collection[int], members: int) -> tuple[tuple[int, int], ...]:
    """Returns the runs (direction, hops) with the fewest hops that reach all distances in `needed`.

    Direction +1 receives from the preceding member, -1 from the following one. A window that reaches a few shards back
    takes one run of a few hops; one that also reaches ahead takes a second run in the other direction.

    Args:
      needed: distances, 0 < h < members, from which some member needs keys.
      members: number of members of the ring.
    """
    # Distances below the widest gap are reached in direction +1, those above it in direction -1.
    stops = [0, *sorted(needed), members]
    gap = max(range(len(stops) - 1), key=lambda n: (stops[n + 1] - stops[n], n))
    runs = (1, stops[gap]), (-1, members - stops[gap + 1])
    return tuple((direction, hops) for direction, hops in runs if hops)
