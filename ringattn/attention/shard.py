"""Attention inside a shard_map: picks the strategy for the local shards, and gives it its gradient.

A strategy is, like a kernel, a pair of functions `forward` and `backward` (`ringattn.attention.kernels`), which is why
a ring can be the kernel of another ring, and why one custom_vjp serves all.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from ringattn.attention.checks import axis_names, check_arrays, check_settings
from ringattn.attention.exchange import exchange
from ringattn.attention.gather import Gather
from ringattn.attention.kernels import Keys, Queries, Rule, Saved, no_gradients, nothing
from ringattn.attention.local import choose_kernel
from ringattn.attention.mask import Mask, Tokens
from ringattn.attention.ring import Ring
from ringattn.attention.softmax import shifted_exp, varying_like, with_sink
from ringattn.layout import check_length, shard_positions


def shard_attention(
    query: Float[Array, "B L H D"],
    key: Float[Array, "B L G D"],
    value: Float[Array, "B L G Dv"],
    *,
    mask: Mask = Mask(),
    segment_ids: Int[Array, "B L"] | None = None,
    span_ids: Int[Array, "B L"] | None = None,
    positions: Int[Array, "B L"] | None = None,
    layout: str = "contiguous",
    strategy: str = "ring",
    axis: str | tuple[str, str] = "context",
    scale: float | None = None,
    soft_cap: float | None = None,
    sinks: Float[Array, " H"] | None = None,
    slopes: Float[Array, " H"] | None = None,
    kernel: str = "auto",
) -> Float[Array, "B L H Dv"]:
    """`ringattn.attention` of local shards, to be called inside a `jax.shard_map` that is manual over `axis`.

    Arguments as there, but L, B and heads are this device's own, and `sinks` and `slopes` are of its own heads.

    Raises:
      ValueError: if the arguments do not fit each other.
    """
    ids = {"segment_ids": segment_ids, "span_ids": span_ids, "positions": positions}
    check_arrays(query, key, value, ids, {"sinks": sinks, "slopes": slopes})
    check_settings(strategy, axis_names(axis), kernel, soft_cap)
    shards, local, groups = lax.axis_size(axis), query.shape[1], key.shape[2]
    check_length(local * shards, layout, shards, "the sequence length of all shards")
    implied = None if positions is not None else layout
    if positions is None:
        positions = shard_positions(layout, lax.axis_index(axis), shards, local)[None]
    tokens = Tokens(positions, segment_ids, span_ids)
    if segment_ids is not None:  # whatever lies in padding, even NaN, is not to be multiplied with a weight of 0
        query, key, value = (_without_padding(x, segment_ids) for x in (query, key, value))
    rule = Rule(mask, query.shape[-1] ** -0.5 if scale is None else scale, soft_cap)
    # All marked as varying alike, so that what is summed over devices in the gradient is left to JAX.
    arrays = query, key, value, slopes, sinks, tokens
    query, key, value, slopes, sinks, tokens = jax.tree.map(lambda x: varying_like(x, *jax.tree.leaves(arrays)), arrays)
    queries = Queries(rearrange(query, "B L (G R) D -> B G R L D", G=groups), tokens)
    keys = Keys(rearrange(key, "B L G D -> B G L D"), rearrange(value, "B L G D -> B G L D"), tokens)
    per_head = [None if x is None else x.reshape(groups, -1) for x in (slopes, sinks)]
    attend = _strategy(strategy, axis, implied, choose_kernel(kernel), rule)
    out = rearrange(attend(queries, keys, *per_head), "B G R L D -> B L (G R) D")
    return out if segment_ids is None else _without_padding(out, segment_ids)


def _without_padding(x: Float[Array, "B L H D"], segment_ids: Int[Array, "B L"]) -> Float[Array, "B L H D"]:
    """x with 0 at padding; so is its gradient."""
    return jnp.where((segment_ids >= 0)[:, :, None, None], x, jnp.zeros((), x.dtype))


def _strategy(strategy: str, axis: Any, implied: str | None, kernel: Any, rule: Rule) -> Any:
    """attend(queries, keys, slopes, sinks) for the strategy; `implied` is the layout, None if positions are given."""
    nested = not isinstance(axis, str)
    if strategy == "gather":
        return partial(_attend, Gather(axis, kernel), rule)
    if strategy == "ulysses":
        return partial(exchange, partial(_attend, kernel, rule), axis)
    if strategy == "usp":
        outer, inner = axis
        ring = Ring(outer, implied, kernel, group=lax.axis_size(inner))
        return partial(exchange, partial(_attend, ring, rule), inner)
    if nested:
        outer, inner = axis
        # The inner ring's visitors come from anywhere on the outer one: their positions travel.
        return partial(_attend, Ring(outer, implied, Ring(inner, None, kernel), inner=inner), rule)
    return partial(_attend, Ring(axis, implied, kernel), rule)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(strategy: Any, rule: Rule, queries: Queries, keys: Keys, slopes: Any, sinks: Any) -> Any:
    """[B, G, R, L, Dv] in query's dtype."""
    return _forward(strategy, rule, queries, keys, slopes, sinks)[0]


def _forward(strategy: Any, rule: Rule, queries: Queries, keys: Keys, slopes: Any, sinks: Any) -> Any:
    part = strategy.forward(rule, queries, keys, slopes, nothing(queries, keys, slopes))
    if sinks is not None:
        part = with_sink(part, sinks[None].astype(part.lse.dtype))
    # Named, so that a jax.checkpoint policy can save them: then no third turn of K/V is needed to recompute them.
    out = checkpoint_name(part.out.astype(queries.query.dtype), "attention_out")
    lse = checkpoint_name(part.lse, "attention_lse")
    return out, (queries, keys, slopes, sinks, out, lse)


def _backward(strategy: Any, rule: Rule, saved: Any, d_out: Any) -> Any:
    queries, keys, slopes, sinks, out, lse = saved
    delta = (d_out.astype(lse.dtype) * out.astype(lse.dtype)).sum(-1)
    before = no_gradients(queries, keys, slopes)
    of_queries, of_keys = strategy.backward(rule, queries, keys, slopes, Saved(lse, delta, d_out), before)
    none = jax.tree.map(lambda x: None, queries.tokens)
    d_query = of_queries.query.astype(queries.query.dtype)
    d_key, d_value = of_keys.key.astype(keys.key.dtype), of_keys.value.astype(keys.value.dtype)
    d_slopes = None if slopes is None else of_queries.slopes.astype(slopes.dtype)
    d_sinks = None
    if sinks is not None:
        d_sinks = -(shifted_exp(sinks[None, ..., None].astype(lse.dtype), lse) * delta).sum((0, 3)).astype(sinks.dtype)
    return Queries(d_query, none), Keys(d_key, d_value, none), d_slopes, d_sinks


_attend.defvjp(_forward, _backward)
