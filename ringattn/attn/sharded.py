"""Attention on local shards, inside a shard_map, and its gradient.

A strategy is a kernel (`kernels.protocol.Kernel`) that also communicates. A single custom_vjp therefore covers all
strategies, and a ring can be the kernel of another ring.
"""

from functools import partial

import jax
from einops import rearrange
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from ringattn.attn.checks import Extras, TokenIds, check_arrays, check_lengths, ids_pair, manual_devices
from ringattn.attn.inputs import Inputs, group_heads, to_kernel_dims, ungroup_heads, zero_padding
from ringattn.attn.kernels.protocol import Kernel, LogitSpec, Residuals, init_partial
from ringattn.attn.mask import Mask, Tokens
from ringattn.attn.positions import ImpliedPositions
from ringattn.attn.settings import Settings
from ringattn.attn.softmax import shifted_exp, varying_like
from ringattn.attn.strategies import Strategies, drop_unit_axes
from ringattn.compilation_cache import disable_for_cpus


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
    """Computes `ringattn.attention` on local shards, inside a `jax.shard_map` that is manual over `axis`.

    Takes the same arguments as `ringattn.attention`, except `spec`. All array arguments are local shards.

    Raises:
      ValueError: if the arguments are inconsistent with each other, or outside such a shard_map.
    """
    settings = Settings(
        mask=mask,
        layout=layout,
        strategy=strategy,
        axis=axis,
        scale=scale,
        soft_cap=soft_cap,
        kernel=kernel,
        reduce_dtype=reduce_dtype,
    )
    extras = Extras(positions=positions, segment_ids=segment_ids, sinks=sinks, slopes=slopes, span_ids=span_ids)
    extras = check_arrays(query, key, value, extras)
    check_lengths(settings, query, key, manual_devices(settings.axes), local=True)
    return local_attention(settings, query, key, value, extras)


def local_attention(
    settings: Settings,
    query: Float[Array, "B L H D"],
    key: Float[Array, "B M G D"],
    value: Float[Array, "B M G Dv"],
    extras: Extras,
) -> Float[Array, "B L H Dv"]:
    """Computes `shard_attention` without checking the arguments."""
    disable_for_cpus(jax.sharding.get_abstract_mesh())
    axis = settings.axis if settings.strategy == "usp" else drop_unit_axes(settings.axes)
    positions, segments, spans = map(ids_pair, (extras.positions, extras.segment_ids, extras.span_ids))
    if positions[0] is None:
        implied = ImpliedPositions(settings.layout, lax.axis_size(axis), query.shape[1], key.shape[1])
        shard = lax.axis_index(axis)
        tokens = implied.local_tokens(shard, 1)
    else:
        implied, tokens = None, map(Tokens, positions)
    q_tokens, kv_tokens = (x._replace(segments=segments[n], spans=spans[n]) for n, x in enumerate(tokens))
    if segments[0] is not None:  # otherwise a NaN in padding, times a weight of 0, would be NaN
        query = zero_padding(query, segments[0])
        key, value = (zero_padding(x, segments[1]) for x in (key, value))
    scale = query.shape[-1] ** -0.5 if settings.scale is None else settings.scale
    logit_spec = LogitSpec(settings.mask, scale, settings.soft_cap)
    # All inputs must vary over the same mesh axes. pcast transposes to a psum over the gradients of replicated inputs.
    inputs = Inputs(query, key, value, q_tokens, kv_tokens, extras.slopes, extras.sinks)
    inputs = jax.tree.map(lambda x: varying_like(x, *jax.tree.leaves(inputs)), inputs)
    out = Strategies(settings, axis, implied).choose(lambda kernel, x: _attend(kernel, logit_spec, x), inputs)(inputs)
    return out if segments[0] is None else zero_padding(out, segments[0])


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(kernel: Kernel, logit_spec: LogitSpec, inputs: Inputs) -> Float[Array, "B L H Dv"]:
    """Computes the output in query's dtype."""
    return _attend_forward(kernel, logit_spec, inputs)[0]


VjpResiduals = tuple[Inputs, Float[Array, "B L H Dv"], Float[Array, "B G R L"]]
"""Residuals of the custom_vjp: inputs, output and lse."""


def _attend_forward(
    kernel: Kernel, logit_spec: LogitSpec, inputs: Inputs
) -> tuple[Float[Array, "B L H Dv"], VjpResiduals]:
    queries, kv, slopes, sinks = to_kernel_dims(inputs)
    carry = None if sinks is None else init_partial(queries, kv, slopes, sinks)
    part = kernel.forward(logit_spec, queries, kv, slopes, carry, inputs.query.dtype)
    # A jax.checkpoint policy must save both by name: recomputing either would rotate K/V a third time.
    out = checkpoint_name(ungroup_heads(part.out), "attention_out")
    lse = checkpoint_name(part.lse, "attention_lse")
    return out, (inputs, out, lse)


def _attend_backward(
    kernel: Kernel, logit_spec: LogitSpec, vjp_residuals: VjpResiduals, d_out: Float[Array, "B L H Dv"]
) -> tuple[Inputs]:
    # The barrier prevents common-subexpression elimination between the forward and backward transfers, which would keep
    # the forward pass's K/V shards alive until the backward pass.
    (inputs, out, lse), d_out = lax.optimization_barrier((vjp_residuals, d_out))
    queries, kv, slopes, sinks = to_kernel_dims(inputs)
    delta = (d_out.astype(lse.dtype) * out.astype(lse.dtype)).sum(-1)
    delta = rearrange(delta, "B L (G R) -> B G R L", G=inputs.key.shape[2])
    residuals = Residuals(lse, delta, *(group_heads(x, inputs.key.shape[2]) for x in (d_out, out)))
    query_grads, kv_grads = kernel.backward(logit_spec, queries, kv, slopes, residuals, None, inputs.query.dtype)
    d_query = ungroup_heads(query_grads.query)
    d_key, d_value = (rearrange(x.astype(inputs.key.dtype), "B G M D -> B M G D") for x in kv_grads)
    d_slopes = d_sinks = None
    if inputs.slopes is not None and query_grads.slopes is not None:
        d_slopes = query_grads.slopes.astype(inputs.slopes.dtype).reshape(-1)
    if inputs.sinks is not None and sinks is not None:
        # The sink's value is 0, so the gradient of its logit is -delta times the sink's probability.
        sink_grads = -(shifted_exp(sinks[None, ..., None].astype(lse.dtype), lse) * delta).sum((0, 3))
        d_sinks = sink_grads.astype(inputs.sinks.dtype).reshape(-1)
    grads = {"query": d_query, "key": d_key, "value": d_value, "slopes": d_slopes, "sinks": d_sinks}
    return (inputs._replace(**grads, q_tokens=None, kv_tokens=None),)  # integer ids have no gradient


_attend.defvjp(_attend_forward, _attend_backward)
