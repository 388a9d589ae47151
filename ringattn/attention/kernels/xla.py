"""Attention by tiles in plain XLA, for any device: memory of one tile of logits, work for the visible tiles only.

Every pair of a query tile and a key tile is judged beforehand by the bounds of its positions, segments and spans
(`tiles.visit`), so that there are as many trips as there is work, however tokens lie and documents are packed.
Forward is online softmax; backward recomputes a tile's probabilities from lse (FlashAttention-2, arXiv 2307.08691).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ringattn.attention.kernels import Gradients, Keys, Queries, Rule
from ringattn.attention.kernels.tiles import Pair, pad, padded, visit
from ringattn.attention.mask import visible
from ringattn.attention.softmax import Partial, normalise, shifted_exp, varying_like


def forward(rule: Rule, queries: Queries, keys: Keys, slopes: Any) -> Partial:
    """Attention of all queries to these keys; see `ringattn.attention.kernels`."""
    length = queries.query.shape[3]
    queries, keys = padded(queries, keys)
    weighted = _zeros((*queries.query.shape[:-1], keys.value.shape[-1]), queries, keys, slopes)
    total = _zeros(queries.query.shape[:-1], queries, keys, slopes)

    def trip(at: Pair, carry, masked: bool):
        weighted, total, peak = carry
        logits, _ = _logits(rule, queries, keys, slopes, at, masked)
        old = at.q(peak)
        new = jnp.maximum(old, logits.max(-1))
        weights, decay = shifted_exp(logits, new[..., None]), shifted_exp(old, new)
        value = at.k(keys.value)
        part = _dot("grqk,gkd->grqd", weights.astype(value.dtype), value)
        weighted = at.put_q(weighted, at.q(weighted) * decay[..., None] + part)
        total = at.put_q(total, at.q(total) * decay + weights.sum(-1))
        return weighted, total, at.put_q(peak, new)

    weighted, total, peak = visit(rule.mask, queries, keys, trip, (weighted, total, total - jnp.inf))
    part = normalise(weighted, total, peak)
    return Partial(part.out[:, :, :, :length], part.lse[..., :length])


def backward(rule: Rule, queries: Queries, keys: Keys, slopes: Any, lse: Any, delta: Any, d_out: Any) -> Gradients:
    """Gradients of attention by these keys' part in it; see `ringattn.attention.kernels`."""
    length, keys_length = queries.query.shape[3], keys.key.shape[2]
    queries, keys = padded(queries, keys)
    lse, delta, d_out = (pad(x, 3, queries.query.shape[3]) for x in (lse, delta, d_out))
    shapes = queries.query.shape, keys.key.shape, keys.value.shape, None if slopes is None else slopes.shape
    start = Gradients(*(None if shape is None else _zeros(shape, queries, keys, slopes, d_out) for shape in shapes))

    def trip(at: Pair, grads: Gradients, masked: bool):
        logits, tangent = _logits(rule, queries, keys, slopes, at, masked)
        query, key, value, d = at.q(queries.query), at.k(keys.key), at.k(keys.value), at.q(d_out)
        weights = shifted_exp(logits, at.q(lse)[..., None])
        d_value = _dot("grqk,grqd->gkd", weights.astype(d.dtype), d)
        d_logits = weights * (_dot("grqd,gkd->grqk", d, value) - at.q(delta)[..., None])
        d_scores = (d_logits * tangent).astype(query.dtype)
        d_query = rule.scale * _dot("grqk,gkd->grqd", d_scores, key)
        d_key = rule.scale * _dot("grqk,grqd->gkd", d_scores, query)
        d_slopes = None if slopes is None else grads.slopes - (d_logits * _distance(queries, keys, at)).sum((-2, -1))
        return Gradients(
            at.put_q(grads.query, at.q(grads.query) + d_query),
            at.put_k(grads.key, at.k(grads.key) + d_key),
            at.put_k(grads.value, at.k(grads.value) + d_value),
            d_slopes,
        )

    grads = visit(rule.mask, queries, keys, trip, start)
    return grads._replace(
        query=grads.query[:, :, :, :length], key=grads.key[:, :, :keys_length], value=grads.value[:, :, :keys_length]
    )


def _logits(rule: Rule, queries: Queries, keys: Keys, slopes: Any, at: Pair, masked: bool) -> tuple[Any, Any]:
    """The tile's logits [G, R, queries, keys], -inf where unseen, and their derivative by scale * q.k."""
    logits, tangent = rule.scale * _dot("grqd,gkd->grqk", at.q(queries.query), at.k(keys.key)), 1.0
    if rule.soft_cap is not None:
        bent = jnp.tanh(logits / rule.soft_cap)
        logits, tangent = rule.soft_cap * bent, 1.0 - jnp.square(bent)
    if slopes is not None:
        logits = logits - slopes[..., None, None].astype(logits.dtype) * _distance(queries, keys, at)
    if masked:
        logits = jnp.where(visible(rule.mask, *at.tokens(queries, keys))[None, None], logits, -jnp.inf)
    return logits, tangent


def _distance(queries: Queries, keys: Keys, at: Pair) -> Any:
    """|p_i - p_j| [1, 1, queries, keys] of a tile, for ALiBi (arXiv 2108.12409)."""
    q, k = at.tokens(queries, keys)
    distance = jnp.abs(q.positions[:, None] - k.positions[None, :])
    return distance.astype(accumulator(queries.query.dtype))[None, None]


def _dot(equation: str, a: Any, b: Any) -> Any:
    """einsum that accumulates in float32 (float64 for float64); float32 inputs are not rounded on any device."""
    precision = lax.Precision.DEFAULT if a.dtype == jnp.bfloat16 else lax.Precision.HIGHEST
    return jnp.einsum(equation, a, b, precision=precision, preferred_element_type=accumulator(a.dtype))


def accumulator(dtype: Any) -> Any:
    """The type in which what is made from `dtype` is summed."""
    return jnp.promote_types(dtype, jnp.float32)


def _zeros(shape: tuple[int, ...], *like: Any) -> Any:
    """Zeros to accumulate into, varying over the mesh as whatever is accumulated."""
    leaves = jax.tree.leaves(like)
    return varying_like(jnp.zeros(shape, accumulator(leaves[0].dtype)), *leaves)
