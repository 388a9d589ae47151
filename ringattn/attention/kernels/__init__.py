"""The protocol of kernels: one device's queries against one shard of keys. Each kernel is a module of two functions,

    forward(rule, queries, keys, slopes, before) -> Partial
    backward(rule, queries, keys, slopes, saved, before) -> OfQueries, OfKeys

with heads before the sequence, so that a tile of a head is contiguous: query [B, G, R, L, D] (the R query heads that
share a key head lie together), key [B, G, M, D], value [B, G, M, Dv], slopes [G, R] or None. Both add to what came
`before`, the Partial over other keys and the queries' gradients by them, so that a ring's result exists once and not
once a hop. Inputs are bfloat16 or float32; what comes out is float32 (float64 for float64), because it is yet to be
merged and summed.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ringattn.attention.mask import Mask, Tokens
from ringattn.attention.softmax import Partial, varying_like


@dataclass(frozen=True)
class Rule:
    """How logits are made: scale * q.k, soft_cap * tanh(. / soft_cap) of it, minus slope * distance, then `mask`."""

    mask: Mask
    scale: float
    soft_cap: float | None = None


class Queries(NamedTuple):
    query: Float[Array, "B G R L D"]
    tokens: Tokens


class Keys(NamedTuple):
    key: Float[Array, "B G M D"]
    value: Float[Array, "B G M Dv"]
    tokens: Tokens


class Saved(NamedTuple):
    """What the backward pass needs of the forward's result, over all keys, whatever part of them a call is given."""

    lse: Float[Array, "B G R L"]
    delta: Float[Array, "B G R L"]  # the sum over Dv of d_out * out
    d_out: Float[Array, "B G R L Dv"]


class OfQueries(NamedTuple):
    """Gradients that sum over all keys; `slopes` is None where there are none."""

    query: Float[Array, "B G R L D"]
    slopes: Float[Array, "G R"] | None


class OfKeys(NamedTuple):
    """Gradients that sum over all queries."""

    key: Float[Array, "B G M D"]
    value: Float[Array, "B G M Dv"]


def accumulator(dtype: Any) -> Any:
    """The type in which what is made from `dtype` is summed: float32, or float64 for float64."""
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


def zeros(shape: tuple[int, ...], *like: Any) -> Any:
    """Zeros to accumulate into, which vary over the mesh as the arrays in `like` (pytrees) do."""
    leaves = jax.tree.leaves(like)
    return varying_like(jnp.zeros(shape, accumulator(leaves[0].dtype)), *leaves)


def nothing(queries: Queries, keys: Keys, slopes: Any) -> Partial:
    """The Partial over no keys."""
    out = zeros((*queries.query.shape[:-1], keys.value.shape[-1]), queries, keys, slopes)
    return Partial(out, out[..., 0] - jnp.inf)


def no_gradients(queries: Queries, keys: Keys, slopes: Any) -> OfQueries:
    """The queries' gradients by no keys."""
    like = queries, keys, slopes
    return OfQueries(zeros(queries.query.shape, *like), None if slopes is None else zeros(slopes.shape, *like))
