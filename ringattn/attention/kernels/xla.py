"""Attention by tiles in plain XLA, for any device: memory of one tile of logits, work for the visible tiles only.

Every pair of a query tile and a key tile is judged beforehand by the bounds of its positions, segments and spans
(`tiles.plan`), so that there are as many trips as there is work, however tokens lie and documents are packed.
Forward is online softmax; backward recomputes a tile's probabilities from lse (FlashAttention-2, arXiv 2307.08691).
"""

from typing import Any

import jax.numpy as jnp
from jax import lax

from ringattn.attention.kernels import Keys, OfKeys, OfQueries, Queries, Rule, Saved, accumulator, zeros
from ringattn.attention.kernels.tiles import Pair, pad, padded, plan
from ringattn.attention.mask import visible
from ringattn.attention.softmax import Partial, normalise, shifted_exp


def forward(rule: Rule, queries: Queries, keys: Keys, slopes: Any, before: Partial) -> Partial:
    """Attention of all queries to these keys and those `before`; see `ringattn.attention.kernels`."""
    length = queries.query.shape[3]
    queries, keys = padded(queries, keys)
    before = Partial(*(pad(x, 3, queries.query.shape[3]) for x in before))
    pairs = plan(rule.mask, queries, keys)

    def trip(at: Pair, carry, masked: bool):
        weighted, total, peak = carry
        logits, _ = _logits(rule, queries, keys, slopes, at, masked)
        old = at.q(peak)
        new = jnp.maximum(old, logits.max(-1))
        weights, decay = shifted_exp(logits, new[..., None]), shifted_exp(old, new)
        value = at.k(keys.value)
        part = _dot("bgrqk,bgkd->bgrqd", weights.astype(value.dtype), value)
        weighted = at.put_q(weighted, at.q(weighted) * decay[..., None] + part)
        total = at.put_q(total, at.q(total) * decay + weights.sum(-1))
        return weighted, total, at.put_q(peak, new)

    def fold(part: Partial) -> Partial:
        total = jnp.where(part.lse == -jnp.inf, 0.0, 1.0).astype(part.lse.dtype)
        weighted, total, peak = pairs.visit(trip, (part.out, total, part.lse))
        return normalise(weighted, total, peak)

    part = pairs.if_any(fold, before)
    return Partial(part.out[:, :, :, :length], part.lse[..., :length])


def backward(
    rule: Rule, queries: Queries, keys: Keys, slopes: Any, saved: Saved, before: OfQueries
) -> tuple[OfQueries, OfKeys]:
    """Gradients by these keys' part in attention, and those `before`; see `ringattn.attention.kernels`."""
    length, keys_length = queries.query.shape[3], keys.key.shape[2]
    queries, keys = padded(queries, keys)
    saved = Saved(*(pad(x, 3, queries.query.shape[3]) for x in saved))
    start = before._replace(query=pad(before.query, 3, queries.query.shape[3]))
    like = queries, keys, slopes

    def trip(at: Pair, carry, masked: bool):
        of_queries, of_keys = carry
        logits, tangent = _logits(rule, queries, keys, slopes, at, masked)
        query, key, value = at.q(queries.query), at.k(keys.key), at.k(keys.value)
        lse, delta, d_out = at.q(saved.lse), at.q(saved.delta), at.q(saved.d_out)
        weights = shifted_exp(logits, lse[..., None])
        d_value = _dot("bgrqk,bgrqd->bgkd", weights.astype(d_out.dtype), d_out)
        d_logits = weights * (_dot("bgrqd,bgkd->bgrqk", d_out, value) - delta[..., None])
        d_slopes = of_queries.slopes
        if slopes is not None:
            d_slopes = d_slopes - (d_logits * _distance(queries, keys, at)).sum((0, -2, -1))
        d_scores = (d_logits * tangent).astype(query.dtype)
        d_query = rule.scale * _dot("bgrqk,bgkd->bgrqd", d_scores, key)
        d_key = rule.scale * _dot("bgrqk,bgrqd->bgkd", d_scores, query)
        d_query = at.put_q(of_queries.query, at.q(of_queries.query) + d_query)
        d_key = at.put_k(of_keys.key, at.k(of_keys.key) + d_key)
        d_value = at.put_k(of_keys.value, at.k(of_keys.value) + d_value)
        return OfQueries(d_query, d_slopes), OfKeys(d_key, d_value)

    empty = OfKeys(zeros(keys.key.shape, *like), zeros(keys.value.shape, *like))
    pairs = plan(rule.mask, queries, keys)
    of_queries, of_keys = pairs.if_any(lambda carry: pairs.visit(trip, carry), (start, empty))
    of_queries = of_queries._replace(query=of_queries.query[:, :, :, :length])
    return of_queries, OfKeys(*(x[:, :, :keys_length] for x in of_keys))


def _logits(rule: Rule, queries: Queries, keys: Keys, slopes: Any, at: Pair, masked: bool) -> tuple[Any, Any]:
    """The tile's logits [rows, G, R, queries, keys], -inf where unseen, and their derivative by scale * q.k."""
    logits, tangent = rule.scale * _dot("bgrqd,bgkd->bgrqk", at.q(queries.query), at.k(keys.key)), 1.0
    if rule.soft_cap is not None:
        bent = jnp.tanh(logits / rule.soft_cap)
        logits, tangent = rule.soft_cap * bent, 1.0 - jnp.square(bent)
    if slopes is not None:
        logits = logits - slopes[None, ..., None, None].astype(logits.dtype) * _distance(queries, keys, at)
    if masked:
        logits = jnp.where(visible(rule.mask, *at.tokens(queries, keys))[:, None, None], logits, -jnp.inf)
    return logits, tangent


def _distance(queries: Queries, keys: Keys, at: Pair) -> Any:
    """|p_i - p_j| [rows or 1, 1, 1, queries, keys] of a tile, for ALiBi (arXiv 2108.12409)."""
    q, k = at.tokens(queries, keys)
    distance = jnp.abs(q.positions[:, :, None] - k.positions[:, None, :])
    return distance.astype(accumulator(queries.query.dtype))[:, None, None]


def _dot(equation: str, a: Any, b: Any) -> Any:
    """einsum that accumulates in float32 (float64 for float64); float32 inputs are not rounded on any device."""
    precision = lax.Precision.DEFAULT if a.dtype == jnp.bfloat16 else lax.Precision.HIGHEST
    return jnp.einsum(equation, a, b, precision=precision, preferred_element_type=accumulator(a.dtype))
