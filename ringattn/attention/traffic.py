"""What a device sends in attention, by the laws that the strategies keep. Nothing is traced, no device is needed.

An all-gather is counted as p - 1 sends of a device's own shard, a reduce-scatter and an all-to-all as all but a p-th of
what goes in: what the best algorithms of each take.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp

from ringattn.attention.kernels import accumulator
from ringattn.attention.mask import Mask, needed_hops
from ringattn.attention.ring import plan_hops

ID_BYTES = 4
"""A segment or a position: int32."""


class Traffic(NamedTuple):
    """Of one call of attention, on one device."""

    hops: int
    """Moves of K/V along the ring in a forward pass, and again in a backward pass; 0 where nothing goes round."""
    most: int
    """As many as there would be if the mask excluded nothing."""
    forward: int
    """Bytes sent in a forward pass."""
    backward: int
    """Bytes sent in a backward pass."""


def traffic(
    strategy: str, shards: int | tuple[int, int], query: Any, key: Any, mask: Mask, layout: str, segments: bool = True
) -> Traffic:
    """What `ringattn.attention` sends with positions that `layout` implies, without spans and `reduce_dtype`.

    Args:
      strategy: "ring", "gather", "ulysses" or "usp"; "auto" is for `choose_strategy` to resolve.
      shards: devices over which the sequence lies; (outer, inner) for a nested ring or for "usp".
      query, key: one device's own, [B, L, H, D] and [B, M, G, D], as arrays or as `jax.ShapeDtypeStruct`; the value is
        like the key.
      segments: whether segment ids are given.
    """
    outer, inner = shards if isinstance(shards, tuple) else (shards, 1)
    devices, ids = outer * inner, segments * ID_BYTES * key.shape[0] * key.shape[1]
    if strategy == "gather":
        return _total(Traffic(0, 0, 0, 0), _passed(devices - 1, key, ids))
    if strategy == "ulysses":
        return _exchanged(devices, query, key, segments)
    needed = needed_hops(mask, layout, devices, query.shape[1], key.shape[1], inner)
    hops = sum(times for _, times in plan_hops(needed, outer))
    if strategy == "usp":  # each shard of the ring is of `inner` times the tokens and a part of the heads
        return _total(
            Traffic(hops, outer - 1, 0, 0), _exchanged(inner, query, key, segments), _passed(hops, key, inner * ids)
        )
    assert strategy == "ring", strategy
    turns = (hops + 1) * (inner - 1)  # of the inner ring, whose visitors bring their positions
    moves = Traffic(hops + turns, devices - 1, 0, 0)
    return _total(moves, _passed(hops, key, ids), _passed(turns, key, ids + ID_BYTES * key.shape[1]))


def _passed(times: int, key: Any, ids: int) -> Traffic:
    """K/V sent so often, with `ids` bytes of segments and positions; in a backward pass once more, with gradients."""
    numbers = 2 * key.size
    sent = times * (numbers * key.dtype.itemsize + ids)
    return Traffic(0, 0, sent, sent + times * numbers * jnp.dtype(accumulator(key.dtype)).itemsize)


def _exchanged(devices: int, query: Any, key: Any, segments: bool) -> Traffic:
    """Query, key, value and output change places, and so do their gradients; the segments of both are gathered."""
    held = 2 * (query.size + key.size) * key.dtype.itemsize
    ids = segments * ID_BYTES * key.shape[0] * (query.shape[1] + key.shape[1])
    swapped = held * (devices - 1) // devices
    return Traffic(0, 0, swapped + (devices - 1) * ids, swapped)


def _total(*parts: Traffic) -> Traffic:
    return Traffic(*map(sum, zip(*parts, strict=True)))
