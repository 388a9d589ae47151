"""Reference implementation for tests and notebooks. Materializes all L x M logits.

Evaluates masks independently of `mask.visible`, so that tests find errors in it.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ringattn.attn.checks import TokenIds
from ringattn.attn.mask import Mask

Ids = Array | np.ndarray


def reference_attention(
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
    """Computes `ringattn.attention` by definition, on one device, in the inputs' dtype (use float64).

    The tokens can be in any order if `positions` is given.
    """
    B, L, H, D = query.shape
    key, value = (jnp.repeat(x, H // key.shape[2], axis=2) for x in (key, value))
    M = key.shape[1]
    q_positions, kv_positions = _pair(
        (jnp.arange(L)[None] + M - L, jnp.arange(M)[None]) if positions is None else positions
    )
    i, j = q_positions[:, None, :, None], kv_positions[:, None, None, :]
    logits = (D**-0.5 if scale is None else scale) * jnp.einsum("blhd,bmhd->bhlm", query, key)
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    if slopes is not None:
        logits = logits - slopes[None, :, None, None] * abs(i - j).astype(logits.dtype)
    logits = jnp.where(_visible(mask, i, j, segment_ids, span_ids), logits, -jnp.inf)
    sink = jnp.full((H,), -jnp.inf, logits.dtype) if sinks is None else sinks
    logits = jnp.concatenate([logits, jnp.broadcast_to(sink[None, :, None, None], (B, H, L, 1))], axis=-1)
    row_max = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    weights = jnp.exp(logits - jnp.where(row_max == -jnp.inf, 0.0, row_max))
    row_sum = weights.sum(-1, keepdims=True)
    probs = weights / jnp.where(row_sum == 0, 1.0, row_sum)
    return jnp.einsum("bhlm,bmhd->blhd", probs[..., :-1], value)


def _pair(ids: Ids | tuple[Ids, Ids]) -> tuple[Array, Array]:
    queries, keys = ids if isinstance(ids, tuple) else (ids, ids)
    return jnp.asarray(queries), jnp.asarray(keys)


def _visible(
    mask: Mask, i: Int[Array, "... L 1"], j: Int[Array, "... 1 M"], segment_ids: TokenIds, span_ids: TokenIds
) -> Bool[Array, "... L M"]:
    def same(ids: Ids | tuple[Ids, Ids]) -> Array:
        q_ids, kv_ids = _pair(ids)
        a, b = q_ids[:, None, :, None], kv_ids[:, None, None, :]
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
