"""The interface of kernels, which compute attention of one device's queries to one shard of keys and values (K/V).

Arrays have heads before the sequence, so that a tile of one head is contiguous. The R query heads that share a K/V
head are adjacent: query [B, G, R, L, D], key [B, G, M, D], value [B, G, M, Dv], slopes [G, R].

Inputs are bfloat16 or float32. Results are float32 (float64 for float64), because later shards add to them; the last
call may round the output and the query gradients.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Num

from ringattn.attn.mask import Mask, Tokens
from ringattn.attn.softmax import Partial, varying_like

ArrayOrShape = Array | jax.ShapeDtypeStruct
"""Argument of functions that read only shape and dtype."""
Slopes = Float[Array, "G R"]
"""ALiBi slopes (arXiv 2108.12409), one per query head."""


@dataclass(frozen=True)
class LogitSpec:
    """The logit of a query and a key: scale * q.k, then soft cap, then minus slope * |p_i - p_j|, then `mask`."""

    mask: Mask
    scale: float
    soft_cap: float | None = None


class Queries(NamedTuple):
    """One device's queries."""

    query: Float[Array, "B G R L D"]
    tokens: Tokens


class KV(NamedTuple):
    """One shard of keys and values."""

    key: Float[Array, "B G M D"]
    value: Float[Array, "B G M Dv"]
    tokens: Tokens

    def part(self, start: int, stop: int) -> "KV":
        """Returns keys and values `start` to `stop`."""
        runs = self.tokens.runs and self.tokens.runs.part(start, stop)
        tokens = jax.tree.map(lambda x: x[:, start:stop], self.tokens._replace(runs=runs))
        return KV(self.key[:, :, start:stop], self.value[:, :, start:stop], tokens)

    def halves(self) -> list["KV"]:
        """Splits a shard into two along the sequence; returns a shard of one key unsplit."""
        length = self.key.shape[2]
        middle = (length + 1) // 2  # with an odd length, the first half gets the extra key
        return [self.part(0, middle), self.part(middle, length)] if length > 1 else [self]


class CachedKV(NamedTuple):
    """One layer of one device's part of a cache, in the stack of all layers. `rows` is B, or 1: shared by all rows.

    With int8, the values are key * key_scale.
    """

    key: Num[Array, "layers rows G S D"]
    value: Num[Array, "layers rows G S D"]
    key_scale: Float[Array, "layers rows G S"] | None
    value_scale: Float[Array, "layers rows G S"] | None
    positions: Int[Array, "rows S"]
    slots_in_use: Int[Array, " rows"]
    """Number of slots, from the first on, that may hold a key."""
    layer: Int[Array, ""]

    def sliced(self) -> "CachedKV":
        """Returns the layer as a stack of one."""

        def slice_of(x: Array | None) -> Array | None:
            return None if x is None else lax.dynamic_slice_in_dim(x, self.layer, 1)

        key, value = (lax.dynamic_slice_in_dim(x, self.layer, 1) for x in (self.key, self.value))
        scales = slice_of(self.key_scale), slice_of(self.value_scale)
        return self._replace(
            key=key, value=value, key_scale=scales[0], value_scale=scales[1], layer=jnp.zeros_like(self.layer)
        )


class Residuals(NamedTuple):
    """Per-query results that the backward pass reads. `lse` covers all keys of the sequence and the sink."""

    lse: Float[Array, "B G R L"]
    delta: Float[Array, "B G R L"]  # sum over Dv of d_out * out
    d_out: Float[Array, "B G R L Dv"]
    out: Float[Array, "B G R L Dv"]  # in the dtype of the inputs


class QueryGrads(NamedTuple):
    """Gradients that are summed over all keys."""

    query: Float[Array, "B G R L D"]
    slopes: Slopes | None


class KVGrads(NamedTuple):
    """Gradients that are summed over all queries."""

    key: Float[Array, "B G M D"]
    value: Float[Array, "B G M Dv"]


@runtime_checkable
class Kernel(Protocol):
    """A forward and a backward function for attention.

    Implemented by kernels (one device) and by strategies (frozen dataclasses that communicate and call another
    kernel). Must be hashable: it is a static argument of a custom_vjp.

    `carry` is the result for the keys processed so far, None before the first. A kernel continues from it, so a ring
    holds one result, not one per hop.
    """

    def forward(
        self,
        spec: LogitSpec,
        queries: Queries,
        kv: KV,
        slopes: Slopes | None,
        carry: Partial | None,
        dtype: DTypeLike | None = None,
    ) -> Partial:
        """Returns attention to the keys of `carry` and of `kv` together; without a carry, to those of `kv`.

        `carry` and the result are normalized, in the dtype of `accumulation_dtype`, but `out` is rounded to `dtype` if
        that is given. If a query sees no key of `kv`, its carry changes by rounding at most; out = 0 and lse = -inf if
        it has seen no key at all.
        """
        ...

    def backward(
        self,
        spec: LogitSpec,
        queries: Queries,
        kv: KV,
        slopes: Slopes | None,
        residuals: Residuals,
        carry: QueryGrads | None,
        dtype: DTypeLike | None = None,
    ) -> tuple[QueryGrads, KVGrads]:
        """Returns the query gradients due to `kv`, plus `carry` if given, and the K/V gradients due to these queries.

        Gradients include `spec.scale` and are in the dtype of `accumulation_dtype`, but those of the query are rounded
        to `dtype` if that is given.
        """
        ...


def accumulation_dtype(dtype: np.dtype) -> np.dtype:
    """Returns the dtype in which sums over inputs of `dtype` are kept: float32, or float64 for float64."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def matmul_precision(dtype: DTypeLike) -> lax.Precision:
    """Returns the precision of products of `dtype`. By default TPUs round float32 inputs to bfloat16, GPUs to TF32."""
    return lax.Precision.DEFAULT if jnp.dtype(dtype) == jnp.bfloat16 else lax.Precision.HIGHEST


def zeros(shape: tuple[int, ...], *like: Queries | KV | Slopes | None) -> Array:
    """Returns an accumulator of zeros.

    Its dtype is the `accumulation_dtype` of the first array in `like`. It varies over every mesh axis over which an
    array in `like` varies.
    """
    leaves = jax.tree.leaves(like)
    return varying_like(jnp.zeros(shape, accumulation_dtype(leaves[0].dtype)), *leaves)


def init_partial(queries: Queries, kv: KV, slopes: Slopes | None, sinks: Float[Array, "G R"] | None = None) -> Partial:
    """Returns the Partial before the first key: out = 0, and lse = -inf, or the logit of the query head's sink."""
    out = zeros((*queries.query.shape[:-1], kv.value.shape[-1]), queries, kv, slopes)
    lse = out[..., 0]
    return Partial(out, lse - jnp.inf if sinks is None else lse + sinks[None, ..., None].astype(lse.dtype))


def init_query_grads(queries: Queries, kv: KV, slopes: Slopes | None) -> QueryGrads:
    """Returns the initial query gradients: no keys processed, all zero."""
    like = queries, kv, slopes
    return QueryGrads(zeros(queries.query.shape, *like), None if slopes is None else zeros(slopes.shape, *like))
