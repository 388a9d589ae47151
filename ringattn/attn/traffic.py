"""Computes the bytes that a device sends in attention, without tracing and without devices.

An all-gather counts as p - 1 sends of the local shard. A reduce-scatter and an all-to-all count as (p - 1) / p of
their input. These are the bytes of bandwidth-optimal algorithms.
"""

from typing import NamedTuple

from ringattn.attn.hops import needed_distances, plan_hops
from ringattn.attn.kernels.protocol import ArrayOrShape, accumulation_dtype
from ringattn.attn.mask import Mask

ID_BYTES = 4
"""Bytes of a segment id or a position: int32."""


class Traffic(NamedTuple):
    """Hops and bytes of one attention call on one device."""

    hops: int
    """Number of K/V hops in a forward pass, the same as in a backward pass; 0 without a ring."""
    max_hops: int
    """Number of hops without a mask."""
    forward: int
    """Bytes sent in a forward pass."""
    backward: int
    """Bytes sent in a backward pass."""


def traffic(
    strategy: str,
    shards: int | tuple[int, int],
    query: ArrayOrShape,
    key: ArrayOrShape,
    mask: Mask,
    layout: str,
    segments: bool = True,
) -> Traffic:
    """Returns the traffic of `ringattn.attention`.

    Args:
      strategy: "ring", "gather", "ulysses" or "usp". Resolve "auto" by `choose_strategy` first.
      shards: number of devices over which the sequence is sharded; (outer, inner) for a nested ring or for "usp".
      query, key: one device's shards, [B, L, H, D] and [B, M, G, D]. Assumes that the value has the shape of the key.
      mask: as in `ringattn.attention`. Assumes that no spans are given.
      layout: as in `ringattn.attention`. Assumes that positions are implied, and `reduce_dtype` is None.
      segments: True if segment ids are given.
    """
    outer, inner = shards if isinstance(shards, tuple) else (shards, 1)
    devices, ids = outer * inner, segments * ID_BYTES * key.shape[0] * key.shape[1]
    if strategy == "gather":
        return _total(Traffic(0, 0, 0, 0), _kv_sends(devices - 1, key, ids))
    if strategy == "ulysses":
        return _exchange(devices, query, key, segments)
    needed = needed_distances(mask, layout, devices, query.shape[1], key.shape[1], inner)
    hops = sum(hops for _, hops in plan_hops(needed, outer))
    if strategy == "usp":  # a shard on the ring has `inner` times the tokens and 1 / inner of the heads
        ring = _kv_sends(hops, key, inner * ids)
        return _total(Traffic(hops, outer - 1, 0, 0), _exchange(inner, query, key, segments), ring)
    assert strategy == "ring", strategy
    inner_hops = (hops + 1) * (inner - 1)  # the inner ring also sends positions
    counts = Traffic(hops + inner_hops, devices - 1, 0, 0)
    return _total(counts, _kv_sends(hops, key, ids), _kv_sends(inner_hops, key, ids + ID_BYTES * key.shape[1]))


def _kv_sends(times: int, key: ArrayOrShape, id_bytes: int) -> Traffic:
    """Returns the bytes of K/V and `id_bytes` sent `times` times; a backward pass sends them again, with dK/dV."""
    elements = 2 * key.size
    sent = times * (elements * key.dtype.itemsize + id_bytes)
    return Traffic(0, 0, sent, sent + times * elements * accumulation_dtype(key.dtype).itemsize)


def _exchange(devices: int, query: ArrayOrShape, key: ArrayOrShape, segments: bool) -> Traffic:
    """Returns the bytes of the all-to-all of query, key, value and output, and of gathering segments (forward only)."""
    local_bytes = 2 * (query.size + key.size) * key.dtype.itemsize
    id_bytes = segments * ID_BYTES * key.shape[0] * (query.shape[1] + key.shape[1])
    exchanged = local_bytes * (devices - 1) // devices
    return Traffic(0, 0, exchanged + (devices - 1) * id_bytes, exchanged)


def _total(*terms: Traffic) -> Traffic:
    return Traffic(*map(sum, zip(*terms, strict=True)))
