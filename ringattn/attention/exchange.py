"""Ulysses (arXiv 2309.14509): swap sequence shards for head shards, attend, and swap back.

After the swap a device holds all tokens of the axis and a part of the heads, so whatever attends inside (a local call;
a ring over an outer axis, which makes USP, arXiv 2405.07719) needs to know nothing of it. Its gradient is the swap
back, which JAX derives.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax

from ringattn.attention.kernels import Keys, Queries


def exchange(attend: Callable[..., Any], axis: Any, queries: Queries, keys: Keys, slopes: Any, sinks: Any) -> Any:
    """attend(queries, keys, slopes, sinks) [B, G, R, L, Dv] with the K/V heads G, not L, spread over mesh axis `axis`.

    Raises ValueError if G is not a multiple of the axis' size.
    """
    shards, heads = lax.axis_size(axis), keys.key.shape[1]
    if heads % shards:
        raise ValueError(
            f"strategy='ulysses' cannot split {heads} K/V heads over {shards} devices of axis {axis!r}: use "
            f"strategy='ring' (any number of heads), or an axis whose size divides {heads}"
        )

    def swap(x, dim):
        return lax.all_to_all(x, axis, split_axis=1, concat_axis=dim, tiled=True)

    def whole(x):
        return lax.all_gather(x, axis, axis=1, tiled=True)

    def own_heads(x):
        mine = heads // shards
        return None if x is None else lax.dynamic_slice_in_dim(x, lax.axis_index(axis) * mine, mine, axis=0)

    out = attend(
        Queries(swap(queries.query, 3), jax.tree.map(whole, queries.tokens)),
        Keys(swap(keys.key, 2), swap(keys.value, 2), jax.tree.map(whole, keys.tokens)),
        own_heads(slopes),
        own_heads(sinks),
    )
    return lax.all_to_all(out, axis, split_axis=3, concat_axis=1, tiled=True)
