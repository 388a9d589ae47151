"""Exact attention of a sequence that is spread over the devices of a mesh axis. Start here, then ring.py.

Usable alone: of the rest of ringattn it needs only `layout`.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jaxtyping import Array, Float, Int

from ringattn.attention.local import choose_kernel
from ringattn.attention.mask import Mask
from ringattn.attention.shard import STRATEGIES, shard_attention
from ringattn.layout import check_length

__all__ = ["Mask", "attention", "shard_attention"]


def attention(
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
    spec: jax.P | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    sinks: Float[Array, " H"] | None = None,
    slopes: Float[Array, " H"] | None = None,
    kernel: str = "auto",
) -> Float[Array, "B L H Dv"]:
    """Exact attention over a sequence that is spread over mesh axis `axis`, of the mesh set by `jax.set_mesh`.

    logit = scale * q.k, soft-capped, minus slope * |p_i - p_j|; key j is visible to query i if `mask` allows it, their
    segments agree and are >= 0; softmax over the visible keys and the sink. A query that sees nothing gives 0.
    Differentiable in query, key, value, sinks and slopes; float32 inside.

    Args:
      query: float32 or bfloat16.
      key, value: in query's dtype; H must be a multiple of G, they are never repeated.
      mask: causality, window and chunk, by positions.
      segment_ids: int32; tokens see their own segment only; a negative id is padding: sees and is seen by nothing.
      span_ids: int32; tokens of one span (id >= 0) see each other in both directions, whatever `mask` says of
        causality (prefix-LM, image spans); -1: none.
      positions: int32, of every token as it lies; default: what `layout` implies.
      layout: how the tokens lie over `axis`, as `ringattn.permute` puts them: contiguous, striped or zigzag.
      strategy: "ring"; "gather" (of K/V); "ulysses" (heads for sequence); "usp" (ulysses inside a ring).
      axis: a mesh axis, or (outer, inner): a nested ring, or for "usp" ring over outer and exchange over inner.
      spec: how query lies on the mesh; default: as the array says where the mesh is explicit, else P(None, axis).
      scale: default D ** -0.5.
      soft_cap: logits become soft_cap * tanh(logits / soft_cap).
      sinks: one more logit per head in the denominator, of a key whose value is 0.
      slopes: ALiBi (arXiv 2108.12409).
      kernel: "xla", or "auto".

    Returns:
      [B, L, H, Dv] in query's dtype, lying as query does.

    Raises:
      ValueError: if the arguments do not fit each other or the mesh; it names both values and a cure.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = _names(axis)
    _check_mesh(mesh, axes, strategy)
    choose_kernel(kernel)
    tokens = {"segment_ids": segment_ids, "span_ids": span_ids, "positions": positions}
    _check_arrays(query, key, value, tokens, {"sinks": sinks, "slopes": slopes})
    check_length(query.shape[1], layout, _size(mesh, axes), "query's length L")
    if soft_cap is not None and soft_cap <= 0:
        raise ValueError(f"soft_cap={soft_cap} must be positive; None for no cap")
    spec = _resolve_spec(query, spec, mesh, axes, key.shape[2])
    settings = {"mask": mask, "layout": layout, "strategy": strategy, "scale": scale, "soft_cap": soft_cap}
    settings |= {"kernel": kernel, "axis": axes[0] if len(axes) == 1 else axes}
    arrays = {name: x for name, x in (tokens | {"sinks": sinks, "slopes": slopes}).items() if x is not None}
    return _sharded(spec, tuple(settings.items()), query, key, value, arrays)


@partial(jax.jit, static_argnums=(0, 1))
def _sharded(spec: jax.P, settings: tuple, query: Any, key: Any, value: Any, arrays: dict[str, Any]) -> Any:
    batch, length, heads, _ = spec
    specs = {name: jax.P(heads) if name in ("sinks", "slopes") else jax.P(batch, length) for name in arrays}
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
    if _names(length) != axes:
        raise ValueError(f"spec={spec} puts the sequence over {length!r}, but axis={over!r}: they must agree")
    if depth is not None:
        raise ValueError(f"spec={spec} shards the head dim over {depth!r}; attention needs it whole: give None there")
    missing = [name for entry in (batch, heads) for name in _names(entry) if name not in mesh.axis_names]
    if missing:
        raise ValueError(f"spec={spec} names {missing[0]!r}, but the mesh has the axes {mesh.axis_names}")
    for what, size, entry in (("B", query.shape[0], batch), ("G", kv_heads, heads)):
        count = _size(mesh, _names(entry))
        if size % count:
            raise ValueError(
                f"{what}={size} does not split over the {count} devices of {entry!r}: use a multiple of {count}"
            )
    return jax.P(batch, over, heads, None)


def _check_mesh(mesh: Any, axes: tuple[str, ...], strategy: str) -> None:
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy={strategy!r} is none of {', '.join(map(repr, STRATEGIES))}")
    if mesh.empty:
        raise ValueError("no mesh is set: first call jax.set_mesh(jax.make_mesh((jax.device_count(),), ('context',)))")
    for name in axes:
        if name not in mesh.axis_names:
            raise ValueError(f"axis={name!r} is not in the mesh, whose axes are {mesh.axis_names}: give one of them")
        if mesh.axis_types[mesh.axis_names.index(name)] == AxisType.Manual:
            raise ValueError(f"axis={name!r} is manual here, inside a shard_map: call ringattn.shard_attention instead")
    if len(axes) > 2 or len(set(axes)) < len(axes):
        raise ValueError(f"axis={axes} must be one mesh axis or two different ones, (outer, inner)")
    if strategy == "usp" and len(axes) == 1:
        raise ValueError(
            f"strategy='usp' needs axis=(outer, inner), not {axes[0]!r}; 'ring' and 'ulysses' need one axis"
        )


def _check_arrays(query: Any, key: Any, value: Any, tokens: dict[str, Any], per_head: dict[str, Any]) -> None:
    if query.ndim != 4 or key.ndim != 4 or value.ndim != 4:
        raise ValueError(f"query, key, value must be [B, L, heads, D], not {query.shape}, {key.shape}, {value.shape}")
    (B, L, H, D), G = query.shape, key.shape[2]
    if key.shape != (B, L, G, D) or value.shape[:3] != (B, L, G):
        raise ValueError(
            f"query {query.shape}, key {key.shape}, value {value.shape} must agree in B and L, key also in D"
        )
    if G == 0 or H % G:
        raise ValueError(f"H={H} query heads must be a multiple of G={G} K/V heads: use H={max(H // max(G, 1), 1) * G}")
    if not (query.dtype == key.dtype == value.dtype and jnp.issubdtype(query.dtype, jnp.floating)):
        raise ValueError(f"query, key, value must be of one float dtype, not {query.dtype}, {key.dtype}, {value.dtype}")
    for name, x in tokens.items():
        if x is not None and (x.shape != (B, L) or x.dtype != jnp.int32):
            raise ValueError(f"{name} must be int32 {(B, L)}, [B, L] of query, not {x.dtype} {x.shape}")
    for name, x in per_head.items():
        if x is not None and (x.shape != (H,) or not jnp.issubdtype(x.dtype, jnp.floating)):
            raise ValueError(f"{name} must be float ({H},), one per query head, not {x.dtype} {x.shape}")


def _explicit(mesh: Any) -> bool:
    return all(kind == AxisType.Explicit for kind in mesh.axis_types)


def _names(entry: Any) -> tuple[str, ...]:
    """The mesh axes that an entry of a spec names."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def _size(mesh: Any, axes: tuple[str, ...]) -> int:
    size = 1
    for name in axes:
        size *= mesh.shape[name]
    return size
