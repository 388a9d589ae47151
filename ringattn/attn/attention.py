"""Exact attention over a sequence that is sharded over a mesh axis. Start reading here, then sharded.py and ring.py.

The package can be used on its own: it imports only `ringattn.layout`, `ringattn.hardware` and
`ringattn.compilation_cache`.
"""

import math
from functools import partial

import jax
from jax.sharding import AbstractMesh, AxisType
from jaxtyping import Array, Float

from ringattn.attn.checks import Extras, TokenIds, check_arrays, check_lengths, order_hint
from ringattn.attn.mask import Mask
from ringattn.attn.settings import Settings, axis_names
from ringattn.attn.sharded import local_attention


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
    """Computes exact attention over a sequence that is sharded over `axis` of the mesh set by `jax.set_mesh`.

    `logit_ij = cap(scale * q_i . k_j) - slope * |p_i - p_j|`, where p is the position and cap applies `soft_cap`.
    Key j is visible to query i if `mask` and `span_ids` allow it, and their segments are equal and >= 0. The output is
    the softmax over the visible keys and the sink, times the values; the sink's value is 0. Without visible keys the
    output is 0.
    Accumulates in float32 (float64 for float64). Differentiable in query, key, value, sinks and slopes, by first-order
    reverse mode only. A `jax.checkpoint` policy must save both "attention_out" and "attention_lse"; otherwise the
    backward pass rotates K/V once more.

    Args:
      query: queries [B, L, H, D], the sequence sharded over `axis`, tokens in storage order. float32 or bfloat16.
      key, value: in query's dtype. H must be a multiple of G; K/V heads are never repeated. Query i has position
        i + M - L, as in chunked prefill (negative where i < L - M), unless `positions` is given.
      mask: causality, window and chunk, by positions.
      segment_ids: int32. Tokens see only their own segment. A negative id marks padding, which neither sees nor is
        seen. Ids and positions are one [B, L] array for queries and keys, or a pair (queries
        [B, L], keys [B, M]). NumPy arrays may have any integer dtype if their values fit in int32.
      span_ids: int32. Tokens of one span (id >= 0) see each other in both directions, even under a causal mask
        (prefix-LM, image spans), within the window, chunk and segment; -1: no span.
      positions: int32, in storage order. Default: the positions that `layout` implies. If given, they are sent
        with K/V, no hop is skipped, and `layout` only constrains the lengths.
      layout: storage order of the tokens, as produced by `ringattn.permute`: "contiguous", "striped" or "zigzag". It
        does not depend on the strategy; a pair of axes counts as one axis of outer * inner devices.
      strategy: "ring"; "gather" (all-gathers K/V); "ulysses" (exchanges sequence shards for head shards); "usp"
        (ulysses inside a ring); "auto" (picks the strategy with the least exposed communication: `choose_strategy`).
      axis: a mesh axis, or a pair (outer, inner). With a pair, "ring" is a nested ring, and "usp" is a ring over outer
        and an all-to-all over inner.
      spec: PartitionSpec of query. Default: read from the array on an explicit mesh; P(None, axis) on an auto mesh
        without other axes. Required on an auto mesh with other axes, on which query's sharding is unknown.
      scale: default D ** -0.5.
      soft_cap: logits become soft_cap * tanh(logits / soft_cap). Default: no cap.
      sinks: one extra logit per head in the denominator, like a key whose value is 0.
      slopes: ALiBi slopes (arXiv 2108.12409), one per head.
      kernel: "auto" (the fastest that serves: `choose_kernel`), "xla" (any device), "pallas" (TPU; on CPUs it runs in
        an interpreter, for tests) or "cudnn" (GPU). A named kernel that cannot serve is an error.
      reduce_dtype: dtype in which K/V gradients are sent around a ring or reduced by "gather": "float32", "bfloat16"
        (half the bytes, rounded once per hop), or None: the dtype in which they are summed. An all-to-all (ulysses,
        usp) always sends in query's dtype.

    Returns:
      [B, L, H, Dv] in query's dtype, sharded like query.

    Raises:
      ValueError: if arguments are inconsistent with each other or with the mesh.
    """
    mesh = jax.sharding.get_abstract_mesh()
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
    _check_mesh(mesh, settings.axes)
    extras = check_arrays(query, key, value, extras)
    check_lengths(settings, query, key, _size(mesh, settings.axes))
    spec = _resolve_spec(query, key, spec, mesh, settings.axes)
    return _sharded(spec, settings, query, key, value, extras)


@partial(jax.jit, static_argnums=(0, 1))
def _sharded(
    spec: jax.P,
    settings: Settings,
    query: Float[Array, "B L H D"],
    key: Float[Array, "B M G D"],
    value: Float[Array, "B M G Dv"],
    extras: Extras,
) -> Float[Array, "B L H Dv"]:
    batch, length, heads, _ = spec
    extra_specs = {1: jax.P(heads), 2: jax.P(batch, length)}  # [H] or [B, L], by number of dims
    specs = spec, spec, spec, jax.tree.map(lambda x: extra_specs[x.ndim], extras)
    if _is_explicit(jax.sharding.get_abstract_mesh()):
        query, key, value, extras = jax.tree.map(jax.reshard, (query, key, value, extras), specs)
    local = partial(local_attention, settings)
    return jax.shard_map(local, in_specs=specs, out_specs=spec)(query, key, value, extras)


def _resolve_spec(query: Array, key: Array, spec: jax.P | None, mesh: AbstractMesh, axes: tuple[str, ...]) -> jax.P:
    """Returns query's spec with an entry for each of its four dims, checked against the mesh and `axes`."""
    axis = axes[0] if len(axes) == 1 else axes
    if spec is None:
        spec = _default_spec(query, mesh, axes)
    if not isinstance(spec, jax.P):
        raise ValueError(f"spec={spec!r} must be a jax.P of query [B, L, H, D]; for example jax.P(None, {axis!r})")
    if len(spec) > 4:
        raise ValueError(f"spec={spec} has {len(spec)} entries, but query [B, L, H, D] has 4 dims; use at most 4")
    batch, length, heads, depth = entries = (*spec, *([None] * (4 - len(spec))))
    for entry in entries:
        if not isinstance(entry, str | tuple | None):
            raise ValueError(f"spec={spec} has the entry {entry!r}; use a mesh axis, a tuple of mesh axes, or None")
    if axis_names(length) != axes:
        raise ValueError(f"spec={spec} shards the sequence over {length!r}, but axis={axis!r}; they must agree")
    if depth is not None:
        raise ValueError(f"spec={spec} shards the head dim over {depth!r}, which is not supported; use None for it")
    names = [name for entry in (batch, length, heads) for name in axis_names(entry)]
    for name in names:
        if name not in mesh.axis_names:
            raise ValueError(f"spec={spec} names {name!r}, which must be one of the mesh axes {mesh.axis_names}")
        if names.count(name) > 1:
            rule = f"spec={spec}, given or read from query, shards two dims over {name!r}"
            raise ValueError(f"{rule}; use each mesh axis once{order_hint(query, key)}")
    for name, size, entry in (("B", query.shape[0], batch), ("G", key.shape[2], heads)):
        count = _size(mesh, axis_names(entry))
        if size % count:
            raise ValueError(
                f"{name}={size} must be a multiple of the {count} devices of {entry!r}; use a multiple, or another spec"
            )
    return jax.P(batch, axis, heads, None)


def _default_spec(query: Array, mesh: AbstractMesh, axes: tuple[str, ...]) -> jax.P:
    """Returns the sharding of batch and heads if the mesh is explicit. Under jit, it is unknown on an auto mesh."""
    axis = axes[0] if len(axes) == 1 else axes
    if _is_explicit(mesh):
        batch, _, heads, *_ = (*jax.typeof(query).sharding.spec, None, None, None)
        return jax.P(batch, axis, heads)
    types = zip(mesh.axis_names, mesh.axis_types, strict=True)
    others = [name for name, kind in types if kind != AxisType.Manual and name not in axes and mesh.shape[name] > 1]
    if others:
        fix = f"use spec=jax.P({others[0]!r}, {axis!r}) to shard the batch, or jax.P(None, {axis!r}) to replicate it"
        raise ValueError(f"spec=None would replicate query over {others} of a mesh with auto axes; {fix}")
    return jax.P(None, axis)


def _check_mesh(mesh: AbstractMesh, axes: tuple[str, ...]) -> None:
    if mesh.empty:
        raise ValueError("no mesh is set; first call jax.set_mesh(jax.make_mesh((jax.device_count(),), ('context',)))")
    for name in axes:
        if name not in mesh.axis_names:
            raise ValueError(f"axis={name!r} must be one of the mesh axes {mesh.axis_names}")
        if mesh.axis_types[mesh.axis_names.index(name)] == AxisType.Manual:
            raise ValueError(f"axis={name!r} is manual, as inside a shard_map; call ringattn.shard_attention instead")


def _is_explicit(mesh: AbstractMesh) -> bool:
    return all(axis_type == AxisType.Explicit for axis_type in mesh.axis_types)


def _size(mesh: AbstractMesh, axes: tuple[str, ...]) -> int:
    """Returns the number of devices along `axes`."""
    return math.prod(mesh.shape[name] for name in axes)
