"""Ulysses (arXiv 2309.14509): exchanges sequence shards for head shards, attends, and exchanges back.

After the exchange, a device holds some of the heads for all tokens held by the devices of the axis. It then calls a
kernel, or a ring over an outer axis (USP, arXiv 2405.07719). JAX derives the gradient: the transpose of an all-to-all
is the inverse all-to-all.
"""

from collections.abc import Callable

from jax import lax
from jaxtyping import Array, Float

from ringattn.attn.gather import gather_tokens
from ringattn.attn.inputs import Inputs
from ringattn.attn.mask import Tokens

TokensPair = tuple[Tokens, Tokens]


def exchange(
    attend: Callable[[Inputs], Float[Array, "B L H Dv"]],
    axis: str | tuple[str, str],
    implied_tokens: TokensPair | None,
    inputs: Inputs,
) -> Float[Array, "B L H Dv"]:
    """Runs `attend` with the heads, instead of the sequence, sharded over mesh axis `axis`.

    Args:
      attend: maps Inputs to the output. It receives all tokens held by the devices of `axis`, and a slice of the heads.
      axis: the mesh axis, or axes, of the exchange.
      implied_tokens: the queries and the keys held by all devices of `axis`, without ids; None: positions are given,
        and gathered.
      inputs: this device's shards.

    Raises:
      ValueError: if the K/V heads do not divide evenly over the axis.
    """
    shards, kv_heads = lax.axis_size(axis), inputs.key.shape[2]
    if kv_heads % shards:
        raise ValueError(
            f"strategy 'ulysses' or 'usp' cannot split {kv_heads} K/V heads over {shards} devices of axis {axis!r}; "
            f"use strategy='ring' (any number of heads), or an axis whose size divides {kv_heads}"
        )

    def shard_heads(x: Float[Array, "B L H D"]) -> Float[Array, "B _ _ D"]:
        return lax.all_to_all(x, axis, split_axis=2, concat_axis=1, tiled=True)

    def local_heads(x: Float[Array, " H"] | None) -> Float[Array, " _"] | None:
        if x is None:
            return None
        count = x.shape[0] // shards
        return lax.dynamic_slice_in_dim(x, lax.axis_index(axis) * count, count, axis=0)

    q_tokens, kv_tokens = (None, None) if implied_tokens is None else implied_tokens
    out = attend(
        Inputs(
            query=shard_heads(inputs.query),
            key=shard_heads(inputs.key),
            value=shard_heads(inputs.value),
            q_tokens=gather_tokens(inputs.q_tokens, axis, q_tokens),
            kv_tokens=gather_tokens(inputs.kv_tokens, axis, kv_tokens),
            slopes=local_heads(inputs.slopes),
            sinks=local_heads(inputs.sinks),
        )
    )
    return lax.all_to_all(out, axis, split_axis=1, concat_axis=2, tiled=True)
