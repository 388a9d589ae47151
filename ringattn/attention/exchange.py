"""Ulysses (arXiv 2309.14509): swap sequence shards for head shards, attend, and swap back.

After the swap a device holds all tokens of the axis and a part of the heads, so whatever attends inside (a local call;
a ring over an outer axis, which makes USP, arXiv 2405.07719) needs to know nothing of it. Its gradient is the swap
back, which JAX derives.
"""

from collections.abc import Callable
from typing import Any

from jax import lax

from ringattn.attention.gather import gather_tokens


def exchange(attend: Callable[..., Any], axis: Any, implied: Callable[[int], Any] | None, inputs: Any) -> Any:
    """attend(inputs) [B, L, H, Dv] with the heads, not the sequence, spread over mesh axis `axis`.

    `implied(local)` are the positions [1, shards * local] of all tokens on the axis, `local` of them on a device, so
    that they need not be sent; None where positions are the caller's own.

    Raises ValueError if the K/V heads do not split over the axis.
    """
    shards, heads = lax.axis_size(axis), inputs.key.shape[2]
    if heads % shards:
        raise ValueError(
            f"strategy 'ulysses' or 'usp' cannot split {heads} K/V heads over {shards} devices of axis {axis!r}: use "
            f"strategy='ring' (any number of heads), or an axis whose size divides {heads}"
        )

    def heads_for_sequence(x):
        return lax.all_to_all(x, axis, split_axis=2, concat_axis=1, tiled=True)

    def whole(tokens, local):
        return gather_tokens(tokens, axis, None if implied is None else implied(local))

    def own_heads(x):
        if x is None:
            return None
        mine = x.shape[0] // shards
        return lax.dynamic_slice_in_dim(x, lax.axis_index(axis) * mine, mine, axis=0)

    out = attend(
        inputs._replace(
            query=heads_for_sequence(inputs.query),
            key=heads_for_sequence(inputs.key),
            value=heads_for_sequence(inputs.value),
            of_queries=whole(inputs.of_queries, inputs.query.shape[1]),
            of_keys=whole(inputs.of_keys, inputs.key.shape[1]),
            slopes=own_heads(inputs.slopes),
            sinks=own_heads(inputs.sinks),
        )
    )
    return lax.all_to_all(out, axis, split_axis=1, concat_axis=2, tiled=True)
