"""The oracle: attention by whole arrays, straight from its definition. Slow; for tests and notebooks alone.

Shares nothing with the code that it judges, not even the mask.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ringattn.attention.checks import TokenIds
from ringattn.attention.mask import Mask


def dense_attention(
    query: Float[Array, "B L H D"],
    key: Float[Array, "B M G D"],
    value: Float[Array, "B M G Dv"],
    *,
    mask: Mask = Mask(),
    segment_ids: TokenIds = None,
    span_ids: TokenIds = None,
    positions: TokenIds = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    sinks: Float[Array, " H"] | None = None,
    slopes: Float[Array, " H"] | None = None,
) -> Float[Array, "B L H Dv"]:
    """`ringattn.attention` as defined, of arrays in any order, in the inputs' own dtype (give float64)."""
    B, L, H, D = query.shape
    key, value = (jnp.repeat(x, H // key.shape[2], axis=2) for x in (key, value))
    M = key.shape[1]
    p, r = _pair((jnp.arange(L)[None] + M - L, jnp.arange(M)[None]) if positions is None else positions)
    i, j = p[:, None, :, None], r[:, None, None, :]
    logits = (D**-0.5 if scale is None else scale) * jnp.einsum("blhd,bmhd->bhlm", query, key)
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    if slopes is not None:
        logits = logits - slopes[None, :, None, None] * abs(i - j).astype(logits.dtype)
    logits = jnp.where(_visible(mask, i, j, segment_ids, span_ids), logits, -jnp.inf)
    sink = jnp.full((H,), -jnp.inf, logits.dtype) if sinks is None else sinks
    logits = jnp.concatenate([logits, jnp.broadcast_to(sink[None, :, None, None], (B, H, L, 1))], axis=-1)
    peak = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    weights = jnp.exp(logits - jnp.where(peak == -jnp.inf, 0.0, peak))
    total = weights.sum(-1, keepdims=True)
    weights = weights / jnp.where(total == 0, 1.0, total)
    return jnp.einsum("bhlm,bmhd->blhd", weights[..., :-1], value)


def _pair(x: Any) -> tuple[Any, Any]:
    return x if isinstance(x, tuple) else (x, x)


def _visible(mask: Mask, i: Any, j: Any, segment_ids: Any, span_ids: Any) -> Any:
    def same(ids):
        of_queries, of_keys = _pair(ids)
        a, b = of_queries[:, None, :, None], of_keys[:, None, None, :]
        return (a == b) & (a >= 0)

    allowed = jnp.ones_like(i == j)
    if mask.causal:
        allowed = j <= i if span_ids is None else (j <= i) | same(span_ids)
    if mask.window is not None:
        left, right = (mask.window, mask.window) if isinstance(mask.window, int) else mask.window
        allowed = allowed & (i - left <= j) & (j <= i + right)
    if mask.chunk is not None:
        allowed = allowed & (i // mask.chunk == j // mask.chunk)
    return allowed if segment_ids is None else allowed & same(segment_ids)
