"""The protocol of kernels: one device's queries against one shard of keys. Each kernel is a module of two functions,

    forward(rule, queries, keys, slopes) -> Partial
    backward(rule, queries, keys, slopes, lse, delta, d_out) -> Gradients

with heads before the sequence, so that a tile of a head is contiguous: query [B, G, R, L, D] (the R query heads that
share a key head lie together), key [B, G, M, D], value [B, G, M, Dv], out and d_out [B, G, R, L, Dv], lse and delta
[B, G, R, L], slopes [G, R] or None. `lse` is of the whole row of keys, whatever part of them `keys` holds, and
`delta` the row's sum of d_out * out. Inputs are bfloat16 or float32; everything that comes out is float32 (float64
for float64), because partial results are yet to be merged and summed.
"""

from dataclasses import dataclass
from typing import NamedTuple

from jaxtyping import Array, Float

from ringattn.attention.mask import Mask, Tokens


@dataclass(frozen=True)
class Rule:
    """How logits are made: scale * q.k, then soft_cap * tanh(. / soft_cap), then minus slope * distance, then `mask`."""

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


class Gradients(NamedTuple):
    """float32; `slopes` is None where there are none."""

    query: Float[Array, "B G R L D"]
    key: Float[Array, "B G M D"]
    value: Float[Array, "B G M Dv"]
    slopes: Float[Array, "G R"] | None
