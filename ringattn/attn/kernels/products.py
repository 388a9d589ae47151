"""Splits attention to one shard of keys into products: ranges of queries times ranges of keys, full or causal.

A fused kernel that knows no other masks computes each product. Number and sizes of the products are static. Where a hop
depends on the owner of the shard, a traced index selects the ranges, and a product without visible keys is computed and
discarded. With a `lax.cond`, a GPU would copy the predicate to the host and wait.

    keys                         products
    any, without a mask          all queries, all keys
    local, from index a to b     queries a to b: causal; queries from b on: full
    remote, contiguous           full; discarded if the keys are later
    remote, striped              causal; of the queries from index 1 on if the keys are later
    remote, zigzag               second half of the queries, first half of the keys; and then either both first halves
                                 or both second halves
    all shards                   those of the local shard, and of every remote shard
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from ringattn.attn.kernels.protocol import KV, Queries
from ringattn.attn.mask import Mask, Runs

Index = int | Int[Array, ""]


class Range(NamedTuple):
    """`count` tokens from index `start`, which may be traced."""

    start: Index
    count: int

    def of(self, x: Array, dim: int) -> Array:
        """Returns these tokens of x."""
        return x if self.count == x.shape[dim] else lax.dynamic_slice_in_dim(x, self.start, self.count, dim)

    def set_in(self, x: Array, part: Array, dim: int) -> Array:
        """Returns x with these tokens replaced by `part`."""
        return part if self.count == x.shape[dim] else lax.dynamic_update_slice_in_dim(x, part, self.start, dim)


class Product(NamedTuple):
    """Attention of a range of queries to a range of keys.

    If `causal`, query i of its range sees keys 0 to i of their range, and both have the same count. The result is
    discarded unless `kept`; None: never.
    """

    queries: Range
    keys: Range
    causal: bool = False
    kept: Bool[Array, ""] | None = None


def refusal(mask: Mask, queries: Queries, kv: KV) -> str | None:
    """Returns why visible keys cannot be split into products, as the end of a sentence; None if they can."""
    q, k, length = queries.tokens, kv.tokens, queries.query.shape[3]
    if q.segments is not None:
        return "takes no segment_ids: the number and the lengths of the documents are unknown at compile time"
    if mask.chunk is not None:
        return f"takes no mask with chunk={mask.chunk}"
    if not mask.causal:
        return None if mask.window is None else f"takes window={mask.window} only with causal=True"
    if q.spans is not None:
        return "takes no span_ids"
    if q.runs is None or k.runs is None:
        return "takes a causal mask only with the positions that the layout implies"
    if k.runs.keys is None:
        return "takes a causal mask only with as many keys as queries"
    if length > _shard_length(q.runs):
        return "takes a causal mask over several shards per device only with layout='contiguous'"
    whole = k.runs.keys == "local" and kv.key.shape[2] == length
    if mask.left is not None and not (whole and (q.runs.length, q.runs.step) == (length, 1)):
        return f"takes window={mask.window} only if a device holds the whole sequence in layout='contiguous'"
    return None


def products(mask: Mask, queries: Queries, kv: KV) -> list[Product]:
    """Returns the products of a call that `refusal` does not refuse, for queries with `extra_rows` rows of padding."""
    length, kv_length = queries.query.shape[3], kv.key.shape[2]
    q, k, all_keys = queries.tokens.runs, kv.tokens.runs, Range(0, kv_length)
    if not mask.causal:
        return [Product(Range(0, length), all_keys)]
    assert q is not None
    assert k is not None
    q_positions, kv_start = queries.tokens.positions[0], kv.tokens.positions[0, 0]
    if k.keys == "local":
        return _local(length, all_keys, k.start)
    if k.keys == "remote":
        return _remote(q, length, all_keys, k.start, kv_start < q_positions[k.start])
    own = q_positions[0] if q.step > 1 else q_positions[0] // q.length  # index of the queries' shard
    found, shards = _local(length, Range(own * length, length), 0), kv_length // length
    for distance in range(1, shards):
        shard = (own + distance) % shards
        found += _remote(q, length, Range(shard * length, length), 0, shard < own)
    return found


def extra_rows(mask: Mask, kv: KV) -> int:
    """Returns how many rows of zeros `products` needs after the queries, for a range from index 1 on."""
    runs = kv.tokens.runs
    return int(mask.causal and runs is not None and runs.step > 1 and runs.keys != "local")


def _local(length: int, keys: Range, start: int) -> list[Product]:
    """Returns the products of keys that are the queries' tokens from index `start` on, sorted by position."""
    end = start + keys.count
    later = [Product(Range(end, length - end), keys)] if end < length else []
    return [Product(Range(start, keys.count), keys, causal=True), *later]


def _remote(runs: Runs, length: int, keys: Range, start: int, earlier: Bool[Array, ""]) -> list[Product]:
    """Returns the products of `keys`, the tokens from index `start` on of a remote shard.

    `earlier`: the first of these keys comes before the query of the same index.
    """
    if runs.step > 1:  # query i sees the keys up to index i of an earlier stripe, up to i - 1 of a later one
        shift = jnp.where(earlier, 0, 1)
        local = _local(length, keys, start)
        return [x._replace(queries=Range(x.queries.start + shift, x.queries.count)) for x in local]
    if runs.length == length:
        return [Product(Range(0, length), keys, kept=earlier)]
    half = runs.length  # of a zigzag shard: all queries of the second half see all keys of the first half
    low, high = Range(0, half), Range(half, half)
    if keys.count == half:
        of_low = [Product(high, keys), Product(low, keys, kept=earlier)]
        return of_low if start == 0 else [Product(high, keys, kept=earlier)]
    same = jnp.where(earlier, 0, half)
    return [Product(high, Range(keys.start, half)), Product(Range(same, half), Range(keys.start + same, half))]


def _shard_length(runs: Runs) -> int:
    """Returns the largest number of tokens whose positions increase with the index: a run, or two of a zigzag."""
    return runs.length * (2 if runs.step == 1 else 1)
