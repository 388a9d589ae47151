"""Attention inside a shard_map: picks the strategy for the local shards, and gives it its gradient.

A strategy is, like a kernel, a pair of functions `forward` and `backward` (`ringattn.attention.kernels`), which is why
a ring can be the kernel of another ring, and why one custom_vjp serves all.
"""

from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from ringattn.attention.auto import choose_for
from ringattn.attention.checks import (
    TokenIds,
    axis_names,
    check_arrays,
    check_settings,
    check_tokens,
    several_devices,
)
from ringattn.attention.exchange import exchange
from ringattn.attention.gather import Gather
from ringattn.attention.kernels import Keys, Queries, Rule, Saved, no_gradients, nothing
from ringattn.attention.local import choose_kernel
from ringattn.attention.mask import Mask, Tokens
from ringattn.attention.ring import Ring
from ringattn.attention.softmax import shifted_exp, varying_like, with_sink
from ringattn.layout import check_length, positions_of


class Inputs(NamedTuple):
    """What attends to what; arrays lie as `shard_attention`'s arguments."""

    query: Float[Array, "B L H D"]
    key: Float[Array, "B M G D"]
    value: Float[Array, "B M G Dv"]
    of_queries: Tokens
    of_keys: Tokens
    slopes: Float[Array, " H"] | None
    sinks: Float[Array, " H"] | None


def shard_attention(
    query: Float[Array, "B L H D"],
    key: Float[Array, "B M G D"],
    value: Float[Array, "B M G Dv"],
    *,
    mask: Mask = Mask(),
    segment_ids: TokenIds = None,
    span_ids: TokenIds = None,
    positions: TokenIds = None,
    layout: str = "contiguous",
    strategy: str = "ring",
    axis: str | tuple[str, str] = "context",
    scale: float | None = None,
    soft_cap: float | None = None,
    sinks: Float[Array, " H"] | None = None,
    slopes: Float[Array, " H"] | None = None,
    kernel: str = "auto",
    reduce_dtype: str | None = None,
) -> Float[Array, "B L H Dv"]:
    """`ringattn.attention` of local shards, to be called inside a `jax.shard_map` that is manual over `axis`.

    Arguments as there, but L, M, B and heads are this device's own, and `sinks` and `slopes` are of its own heads.

    Raises:
      ValueError: if the arguments do not fit each other.
    """
    check_arrays(query, key, value, {"sinks": sinks, "slopes": slopes})
    segments, spans, given = check_tokens(query, key, segment_ids=segment_ids, span_ids=span_ids, positions=positions)
    check_settings(strategy, axis_names(axis), kernel, soft_cap, reduce_dtype)
    if strategy != "usp":
        axis = several_devices(axis)
    shards, own, lengths = lax.axis_size(axis), lax.axis_index(axis), (query.shape[1], key.shape[1])
    for length in lengths:
        check_length(length * shards, layout, shards, "the sequence length of all shards")

    def implied(first: Any, count: int, local: int) -> Any:
        """Positions of `count` shards, `local` tokens of each; the queries are the last of the keys' tokens."""
        return positions_of(layout, first, count, shards, local)[None] + shards * (lengths[1] - local)

    of_own = given if positions is not None else [implied(own, 1, length) for length in lengths]
    of_queries, of_keys = map(Tokens, of_own, segments, spans)
    if segment_ids is not None:  # whatever lies in padding, even NaN, is not to be multiplied with a weight of 0
        query = _without_padding(query, of_queries.segments)
        key, value = (_without_padding(x, of_keys.segments) for x in (key, value))
    rule = Rule(mask, query.shape[-1] ** -0.5 if scale is None else scale, soft_cap)
    known = layout if positions is None else None
    if strategy == "auto":
        # A span lets its tokens see ahead, wherever it lies.
        judged = replace(mask, causal=mask.causal and span_ids is None)
        device = jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
        sizes = shards if isinstance(axis, str) else (lax.axis_size(axis[0]), lax.axis_size(axis[1]))
        strategy = choose_for(query, key, judged, known, sizes, device.device_kind)
    places = None if known is None else implied
    attend = _strategy(strategy, axis, known, places, choose_kernel(kernel), reduce_dtype, rule)
    # All marked as varying alike, so that what is summed over devices in the gradient is left to JAX.
    inputs = Inputs(query, key, value, of_queries, of_keys, slopes, sinks)
    out = attend(jax.tree.map(lambda x: varying_like(x, *jax.tree.leaves(inputs)), inputs))
    return out if segment_ids is None else _without_padding(out, of_queries.segments)


def _without_padding(x: Float[Array, "B L H D"], segment_ids: Int[Array, "B L"]) -> Float[Array, "B L H D"]:
    """x with 0 at padding; so is its gradient."""
    return jnp.where((segment_ids >= 0)[:, :, None, None], x, jnp.zeros((), x.dtype))


def _strategy(
    strategy: str, axis: Any, layout: str | None, implied: Any, kernel: Any, reduce_dtype: str | None, rule: Rule
) -> Any:
    """attend(inputs) for the strategy; `layout` and `implied` positions are None where positions are given."""
    ring = partial(Ring, reduce_dtype=reduce_dtype)
    if strategy == "gather":
        return partial(_attend, Gather(axis, layout, kernel, reduce_dtype), rule)
    if strategy == "ulysses":
        places = implied and partial(implied, 0, lax.axis_size(axis))
        return partial(exchange, partial(_attend, kernel, rule), axis, places)
    if isinstance(axis, str):
        return partial(_attend, ring(axis, layout, kernel), rule)
    outer, inner = axis
    if strategy == "usp":
        group = lax.axis_size(inner)
        places = implied and partial(implied, lax.axis_index(outer) * group, group)
        return partial(exchange, partial(_attend, ring(outer, layout, kernel, group=group), rule), inner, places)
    # The inner ring's visitors come from anywhere on the outer one: their positions travel.
    return partial(_attend, ring(outer, layout, ring(inner, None, kernel), inner=inner), rule)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(strategy: Any, rule: Rule, inputs: Inputs) -> Any:
    """[B, L, H, Dv] in query's dtype."""
    return _forward(strategy, rule, inputs)[0]


def _forward(strategy: Any, rule: Rule, inputs: Inputs) -> Any:
    queries, keys, slopes, sinks = _grouped(inputs)
    part = strategy.forward(rule, queries, keys, slopes, nothing(queries, keys, slopes))
    if sinks is not None:
        part = with_sink(part, sinks[None].astype(part.lse.dtype))
    # Named, so that a jax.checkpoint policy can save them: then no third turn of K/V is needed to recompute them.
    out = checkpoint_name(_ungrouped(part.out.astype(inputs.query.dtype)), "attention_out")
    lse = checkpoint_name(part.lse, "attention_lse")
    return out, (inputs, out, lse)


def _backward(strategy: Any, rule: Rule, saved: Any, d_out: Any) -> Any:
    # Its own inputs: were a shard that the forward pass received used again, it would have to be kept until now.
    (inputs, out, lse), d_out = lax.optimization_barrier((saved, d_out))
    queries, keys, slopes, sinks = _grouped(inputs)
    delta = (d_out.astype(lse.dtype) * out.astype(lse.dtype)).sum(-1)
    delta = rearrange(delta, "B L (G R) -> B G R L", G=inputs.key.shape[2])
    known = Saved(lse, delta, _grouped_heads(d_out, inputs))
    before = no_gradients(queries, keys, slopes)
    of_queries, of_keys = strategy.backward(rule, queries, keys, slopes, known, before)
    none = jax.tree.map(lambda x: None, inputs.of_queries)
    d_query = _ungrouped(of_queries.query.astype(inputs.query.dtype))
    d_key, d_value = (rearrange(x.astype(inputs.key.dtype), "B G M D -> B M G D") for x in of_keys)
    d_slopes = d_sinks = None
    if inputs.slopes is not None:
        d_slopes = of_queries.slopes.astype(inputs.slopes.dtype).reshape(-1)
    if inputs.sinks is not None:
        of_sinks = -(shifted_exp(sinks[None, ..., None].astype(lse.dtype), lse) * delta).sum((0, 3))
        d_sinks = of_sinks.astype(inputs.sinks.dtype).reshape(-1)
    return (Inputs(d_query, d_key, d_value, none, none, d_slopes, d_sinks),)


_attend.defvjp(_forward, _backward)


def _grouped(inputs: Inputs) -> tuple[Queries, Keys, Any, Any]:
    """Queries, keys, slopes [G, R] and sinks [G, R] in the shapes that kernels want."""
    queries = Queries(_grouped_heads(inputs.query, inputs), inputs.of_queries)
    key, value = (rearrange(x, "B M G D -> B G M D") for x in (inputs.key, inputs.value))
    slopes, sinks = (None if x is None else x.reshape(inputs.key.shape[2], -1) for x in (inputs.slopes, inputs.sinks))
    return queries, Keys(key, value, inputs.of_keys), slopes, sinks


def _grouped_heads(x: Float[Array, "B L H D"], inputs: Inputs) -> Float[Array, "B G R L D"]:
    return rearrange(x, "B L (G R) D -> B G R L D", G=inputs.key.shape[2])


def _ungrouped(x: Float[Array, "B G R L D"]) -> Float[Array, "B L H D"]:
    return rearrange(x, "B G R L D -> B L (G R) D")
