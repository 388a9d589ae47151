"""Exact attention of a sequence that is spread over the devices of a mesh axis. Start here, then ring.py.

Usable alone: of the rest of ringattn it needs only `layout` and `hardware`.
"""

from functools import partial
from typing import Any

import jax
from jax.sharding import AxisType
from jaxtyping import Array, Float

from ringattn.attention.auto import choose_strategy
from ringattn.attention.checks import TokenIds, axis_names, check_arrays, check_settings, check_tokens
from ringattn.attention.mask import Mask
from ringattn.attention.shard import shard_attention
from ringattn.layout import check_length

__all__ = ["Mask", "attention", "choose_strategy", "shard_attention"]


def attention(
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
    spec: jax.P | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    sinks: Float[Array, " H"] | None = None,
    slopes: Float[Array, " H"] | None = None,
    kernel: str = "auto",
    reduce_dtype: str | None = None,
) -> Float[Array, "B L H Dv"]:
    """Exact attention over a sequence that is spread over mesh axis `axis`, of the mesh set by `jax.set_mesh`.

    logit = scale * q.k, soft-capped, minus slope * |p_i - p_j|; key j is visible to query i if `mask` allows it, their
    segments agree and are >= 0; softmax over the visible keys and the sink. A query that sees nothing gives 0.
    Differentiable in query, key, value, sinks and slopes; float32 inside.

    Args:
      query: float32 or bfloat16.
      key, value: in query's dtype; H must be a multiple of G, they are never repeated. Where M differs from L, the
        queries are the last L of the M tokens (a chunk of a prefill), unless `positions` says otherwise; of more
        queries than keys the first then come before all keys.
      mask: causality, window and chunk, by positions.
      segment_ids: int32; tokens see their own segment only; a negative id is padding: sees and is seen by nothing.
        As of all three ids: [B, L] for queries and keys alike, or a pair, [B, L] of queries and [B, M] of keys.
      span_ids: int32; tokens of one span (id >= 0) see each other in both directions, whatever `mask` says of
        causality (prefix-LM, image spans); -1: none.
      positions: int32, of every token as it lies; default: what `layout` implies.
      layout: how the tokens lie over `axis`, as `ringattn.permute` puts them: contiguous, striped or zigzag.
      strategy: "ring"; "gather" (of K/V); "ulysses" (heads for sequence); "usp" (ulysses inside a ring); "auto": the
        one that `choose_strategy` expects to wait least for the wire.
      axis: a mesh axis, or (outer, inner): a nested ring, or for "usp" ring over outer and exchange over inner.
      spec: how query lies on the mesh; default: as the array says where the mesh is explicit, else P(None, axis).
      scale: default D ** -0.5.
      soft_cap: logits become soft_cap * tanh(logits / soft_cap).
      sinks: one more logit per head in the denominator, of a key whose value is 0.
      slopes: ALiBi (arXiv 2108.12409).
      kernel: "xla", or "auto".
      reduce_dtype: the dtype in which a ring or a gather sends gradients of K/V: None, as they are summed (float32);
        "bfloat16", half the bytes, rounded once a hop. What an exchange sends is always in query's dtype.

    Returns:
      [B, L, H, Dv] in query's dtype, lying as query does.

    Raises:
      ValueError: if the arguments do not fit each other or the mesh; it names both values and a cure.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = axis_names(axis)
    _check_mesh(mesh, axes)
    tokens = {"segment_ids": segment_ids, "span_ids": span_ids, "positions": positions}
    check_arrays(query, key, value, {"sinks": sinks, "slopes": slopes})
    check_tokens(query, key, **tokens)
    check_settings(strategy, axes, kernel, soft_cap, reduce_dtype)
    for name, array in {"query's length L": query, "key's length M": key}.items():
        check_length(array.shape[1], layout, _size(mesh, axes), name)
    spec = _resolve_spec(query, spec, mesh, axes, key.shape[2])
    scale, soft_cap = (None if x is None else float(x) for x in (scale, soft_cap))  # of arrays, too: they are static
    settings = {"mask": mask, "layout": layout, "strategy": strategy, "scale": scale, "soft_cap": soft_cap}
    settings |= {"kernel": kernel, "axis": axes[0] if len(axes) == 1 else axes, "reduce_dtype": reduce_dtype}
    arrays = {name: x for name, x in (tokens | {"sinks": sinks, "slopes": slopes}).items() if x is not None}
    return _sharded(spec, tuple(settings.items()), query, key, value, arrays)


@partial(jax.jit, static_argnums=(0, 1))
def _sharded(spec: jax.P, settings: tuple, query: Any, key: Any, value: Any, arrays: dict[str, Any]) -> Any:
    batch, length, heads, _ = spec
    per_head, per_token = jax.P(heads), jax.P(batch, length)
    specs = {
        name: jax.tree.map(lambda _, each=name: per_head if each in ("sinks", "slopes") else per_token, x)
        for name, x in arrays.items()
    }
    inputs, specs = (query, key, value, arrays), (spec, spec, spec, specs)
    if _explicit(jax.sharding.get_abstract_mesh()):
        inputs = jax.tree.map(jax.reshard, inputs, specs)

    def local(query, key, value, arrays):
        return shard_attention(query, key, value, **arrays, **dict(settings))

    return jax.shard_map(local, in_specs=specs, out_specs=spec)(*inputs)


def _resolve_spec(query: Any, spec: jax.P | None, mesh: Any, axes: tuple[str, ...], kv_heads: int) -> jax.P:
    """All four dims of query's spec, the sequence over `axes` alone, checked against the mesh."""
    over = axes[0] if len(axes) == 1 else axes
    if spec is None:
        entries = jax.typeof(query).sharding.spec if _explicit(mesh) else ()
        batch, _, heads, *_ = (*entries, None, None, None)
        spec = jax.P(batch, over, heads)
    batch, length, heads, depth = (*spec, *([None] * (4 - len(spec))))
    if axis_names(length) != axes:
        raise ValueError(f"spec={spec} puts the sequence over {length!r}, but axis={over!r}: they must agree")
    if depth is not None:
        raise ValueError(f"spec={spec} shards the head dim over {depth!r}; attention needs it whole: give None there")
    missing = [name for entry in (batch, heads) for name in axis_names(entry) if name not in mesh.axis_names]
    if missing:
        raise ValueError(f"spec={spec} names {missing[0]!r}, but the mesh has the axes {mesh.axis_names}")
    for what, size, entry in (("B", query.shape[0], batch), ("G", kv_heads, heads)):
        count = _size(mesh, axis_names(entry))
        if size % count:
            raise ValueError(
                f"{what}={size} does not split over the {count} devices of {entry!r}: use a multiple of {count}"
            )
    return jax.P(batch, over, heads, None)


def _check_mesh(mesh: Any, axes: tuple[str, ...]) -> None:
    if mesh.empty:
        raise ValueError("no mesh is set: first call jax.set_mesh(jax.make_mesh((jax.device_count(),), ('context',)))")
    for name in axes:
        if name not in mesh.axis_names:
            raise ValueError(f"axis={name!r} is not in the mesh, whose axes are {mesh.axis_names}: give one of them")
        if mesh.axis_types[mesh.axis_names.index(name)] == AxisType.Manual:
            raise ValueError(f"axis={name!r} is manual here, inside a shard_map: call ringattn.shard_attention instead")


def _explicit(mesh: Any) -> bool:
    return all(kind == AxisType.Explicit for kind in mesh.axis_types)


def _size(mesh: Any, axes: tuple[str, ...]) -> int:
    size = 1
    for name in axes:
        size *= mesh.shape[name]
    return size
