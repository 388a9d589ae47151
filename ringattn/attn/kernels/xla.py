"""Tiled attention in plain XLA, for any device. Holds one tile of logits and skips tiles without visible keys.

The bounds of positions, segments and spans decide beforehand which pairs of tiles are computed (`tiles.plan_tiles`), so
the work follows the mask in every layout and for packed documents. The forward pass is online softmax; the backward
pass recomputes the probabilities of a tile from lse (FlashAttention-2, arXiv 2307.08691).
"""

from dataclasses import dataclass

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ringattn.attn.kernels.protocol import (
    KV,
    KVGrads,
    LogitSpec,
    Queries,
    QueryGrads,
    Residuals,
    Slopes,
    accumulation_dtype,
    init_partial,
    init_query_grads,
    matmul_precision,
    zeros,
)
from ringattn.attn.kernels.tiles import TilePair, pad, pad_to_tiles, plan_tiles
from ringattn.attn.mask import visible
from ringattn.attn.softmax import Partial, normalize, shifted_exp

SoftmaxState = tuple[Array, Array, Array]
"""acc, row_sum and row_max of an online softmax: see `softmax.normalize`."""


@dataclass(frozen=True)
class Xla:
    """The kernel in plain XLA. `tile` is the maximum number of queries and of keys in a tile."""

    tile: tuple[int, int]

    def forward(
        self,
        spec: LogitSpec,
        queries: Queries,
        kv: KV,
        slopes: Slopes | None,
        carry: Partial | None,
        dtype: DTypeLike | None = None,
    ) -> Partial:
        """See `protocol.Kernel.forward`."""
        length, carry = queries.query.shape[3], carry or init_partial(queries, kv, slopes)
        queries, kv = pad_to_tiles(queries, kv, self.tile)
        carry = Partial(*(pad(x, 3, queries.query.shape[3]) for x in carry))
        plan = plan_tiles(spec.mask, queries, kv, self.tile)

        def step(pair: TilePair, state: SoftmaxState, masked: bool) -> SoftmaxState:
            acc, row_sum, row_max = state
            logits, _ = _logits(spec, queries, kv, slopes, pair, masked)
            old_max = pair.q_tile(row_max)
            new_max = jnp.maximum(old_max, logits.max(-1))
            weights, decay = shifted_exp(logits, new_max[..., None]), shifted_exp(old_max, new_max)
            value = pair.kv_tile(kv.value)
            weighted = _dot("bgrqk,bgkd->bgrqd", weights.astype(value.dtype), value)
            acc = pair.set_q_tile(acc, pair.q_tile(acc) * decay[..., None] + weighted)
            row_sum = pair.set_q_tile(row_sum, pair.q_tile(row_sum) * decay + weights.sum(-1))
            return acc, row_sum, pair.set_q_tile(row_max, new_max)

        def add_all(part: Partial) -> Partial:
            # A normalized Partial is an online-softmax state with row_sum 1 and row_max lse; row_sum is 0 without keys.
            row_sum = jnp.where(part.lse == -jnp.inf, 0.0, 1.0).astype(part.lse.dtype)
            acc, row_sum, row_max = plan.visit(step, (part.out, row_sum, part.lse))
            return normalize(acc, row_sum, row_max)

        part = plan.if_any(add_all, carry)
        return Partial(part.out[:, :, :, :length].astype(dtype or part.out.dtype), part.lse[..., :length])

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
        """See `protocol.Kernel.backward`."""
        length, kv_length = queries.query.shape[3], kv.key.shape[2]
        carry = carry or init_query_grads(queries, kv, slopes)
        queries, kv = pad_to_tiles(queries, kv, self.tile)
        residuals = Residuals(*(pad(x, 3, queries.query.shape[3]) for x in residuals))
        carry = carry._replace(query=pad(carry.query, 3, queries.query.shape[3]))
        like = queries, kv, slopes

        def step(pair: TilePair, state: tuple[QueryGrads, KVGrads], masked: bool) -> tuple[QueryGrads, KVGrads]:
            query_grads, kv_grads = state
            logits, cap_gradient = _logits(spec, queries, kv, slopes, pair, masked)
            query, key, value = pair.q_tile(queries.query), pair.kv_tile(kv.key), pair.kv_tile(kv.value)
            lse, delta, d_out = (pair.q_tile(x) for x in residuals[:3])
            probs = shifted_exp(logits, lse[..., None])
            d_value = _dot("bgrqk,bgrqd->bgkd", probs.astype(d_out.dtype), d_out)
            d_logits = probs * (_dot("bgrqd,bgkd->bgrqk", d_out, value) - delta[..., None])
            d_slopes = query_grads.slopes
            if d_slopes is not None:
                d_slopes = d_slopes - (d_logits * _distance(queries, kv, pair)).sum((0, -2, -1))
            d_uncapped = (d_logits * cap_gradient).astype(query.dtype)
            d_query = spec.scale * _dot("bgrqk,bgkd->bgrqd", d_uncapped, key)
            d_key = spec.scale * _dot("bgrqk,bgrqd->bgkd", d_uncapped, query)
            d_query = pair.set_q_tile(query_grads.query, pair.q_tile(query_grads.query) + d_query)
            d_key = pair.set_kv_tile(kv_grads.key, pair.kv_tile(kv_grads.key) + d_key)
            d_value = pair.set_kv_tile(kv_grads.value, pair.kv_tile(kv_grads.value) + d_value)
            return QueryGrads(d_query, d_slopes), KVGrads(d_key, d_value)

        no_kv_grads = KVGrads(zeros(kv.key.shape, *like), zeros(kv.value.shape, *like))
        plan = plan_tiles(spec.mask, queries, kv, self.tile)
        query_grads, kv_grads = plan.if_any(lambda state: plan.visit(step, state), (carry, no_kv_grads))
        d_query = query_grads.query[:, :, :, :length]
        query_grads = query_grads._replace(query=d_query.astype(dtype or d_query.dtype))
        return query_grads, KVGrads(*(x[:, :, :kv_length] for x in kv_grads))


def _logits(
    spec: LogitSpec, queries: Queries, kv: KV, slopes: Slopes | None, pair: TilePair, masked: bool
) -> tuple[Float[Array, "rows G R queries keys"], Float[Array, "rows G R queries keys"] | float]:
    """Returns a tile's logits, -inf where not visible, and the derivative of the soft cap."""
    query, key = pair.q_tile(queries.query), pair.kv_tile(kv.key)
    logits, cap_gradient = spec.scale * _dot("bgrqd,bgkd->bgrqk", query, key), 1.0
    if spec.soft_cap is not None:
        capped = jnp.tanh(logits / spec.soft_cap)
        logits, cap_gradient = spec.soft_cap * capped, 1.0 - jnp.square(capped)
    if slopes is not None:
        logits = logits - slopes[None, ..., None, None].astype(logits.dtype) * _distance(queries, kv, pair)
    if masked:
        logits = jnp.where(visible(spec.mask, *pair.tokens(queries, kv))[:, None, None], logits, -jnp.inf)
    return logits, cap_gradient


def _distance(queries: Queries, kv: KV, pair: TilePair) -> Float[Array, "rows_or_1 1 1 queries keys"]:
    """Returns a tile's |p_i - p_j|."""
    q, k = pair.tokens(queries, kv)
    distance = jnp.abs(q.positions[:, :, None] - k.positions[:, None, :])
    return distance.astype(accumulation_dtype(queries.query.dtype))[:, None, None]


def _dot(equation: str, a: Array, b: Array) -> Array:
    """Computes an einsum with accumulation in float32 (float64 for float64)."""
    options = {"precision": matmul_precision(a.dtype), "preferred_element_type": accumulation_dtype(a.dtype)}
    return jnp.einsum(equation, a, b, **options)
