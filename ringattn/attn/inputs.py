"""One device's arrays, in the dims of `shard_attention` and in those of kernels."""

from typing import NamedTuple

import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int

from ringattn.attn.kernels.protocol import KV, Queries, Slopes
from ringattn.attn.mask import Tokens


class Inputs(NamedTuple):
    """One device's arrays in the dims of `shard_attention`, with ids and positions."""

    query: Float[Array, "B L H D"]
    key: Float[Array, "B M G D"]
    value: Float[Array, "B M G Dv"]
    q_tokens: Tokens
    kv_tokens: Tokens
    slopes: Float[Array, " H"] | None
    sinks: Float[Array, " H"] | None


def to_kernel_dims(inputs: Inputs) -> tuple[Queries, KV, Slopes | None, Float[Array, "G R"] | None]:
    """Returns queries, K/V, slopes and sinks, with the H query heads as G groups of R."""
    kv_heads = inputs.key.shape[2]
    queries = Queries(group_heads(inputs.query, kv_heads), inputs.q_tokens)
    key, value = (rearrange(x, "B M G D -> B G M D") for x in (inputs.key, inputs.value))
    slopes, sinks = (None if x is None else x.reshape(kv_heads, -1) for x in (inputs.slopes, inputs.sinks))
    return queries, KV(key, value, inputs.kv_tokens), slopes, sinks


def group_heads(x: Float[Array, "B L H D"], kv_heads: int) -> Float[Array, "B {kv_heads} R L D"]:
    """Splits the query heads into groups that share a K/V head, and moves heads before the sequence."""
    return rearrange(x, "B L (G R) D -> B G R L D", G=kv_heads)


def ungroup_heads(x: Float[Array, "B G R L D"]) -> Float[Array, "B L H D"]:
    """Restores the dims of `shard_attention`: the inverse of `group_heads`."""
    return rearrange(x, "B G R L D -> B L (G R) D")


def zero_padding(x: Float[Array, "B L H D"], segment_ids: Int[Array, "B L"]) -> Float[Array, "B L H D"]:
    """Sets x, and its gradient, to 0 in padding."""
    return jnp.where((segment_ids >= 0)[:, :, None, None], x, jnp.zeros((), x.dtype))
