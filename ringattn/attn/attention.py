"""Exact attention over a sequence that is sharded over a mesh axis. Start reading here, then sharded.py and ring.py.

The package can be used on its own: it imports only `ringattn.layout`, `ringattn.hardware` and
`ringattn.compilation_cache`.
"""

import math
from functools import partial

import jax
from jax.sharding import AbstractMesh, AxisType
from jaxtyping import Array, Float

from ringattn.attn.checks import Extras, Settings, TokenIds, axis_names, check_arrays
from ringattn.attn.mask import Mask
from ringattn.attn.sharded import local_attention
from ringattn.layout import check_length


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

    `logit_ij = soft_cap(scale * q_i . k_j) - slope * |p_i - p_j|`, where p is the position. Key j is visible to query i
    if `mask` and `span_ids` allow it, and their segments are equal and >= 0. The output is the sum of the values
    weighted by the softmax over the visible keys and the sink (whose value is 0). Without visible keys the output is 0.
    Accumulates in float32 (float64 for float64). Differentiable in query, key, value, sinks and slopes, by first-order
    reverse mode only. A `jax.checkpoint` policy must save both "attention_out" and "attention_lse"; otherwise the
    backward pass rotates K/V once more.

    Args:
      query: queries [B, L, H, D], the sequence sharded over `axis`, tokens in storage order. float32 or bfloat16.
      key, value: in query's dtype. H must be a multiple of G; K/V heads are never repeated. Query i has position
        i + M - L, as in chunked prefill (negative where i < L - M), unless `positions` is given.
      mask: causality, window and chunk, by positions.
      segment_ids: int32. Tokens see only their own segment. A negative id marks padding, which sees no key and which no
        query sees. Ids and positions are one [B, L] array for queries and keys, or a pair (queries
        [B, L], keys [B, M]).
      span_ids: int32. Tokens of one span (id >= 0) see each other in both directions, even under a causal mask
        (prefix-LM, image spans), within the window, chunk and segment; -1: no span.
      positions: int32, in storage order. Default: the positions that `layout` implies. If given, `layout` only
        constrains the lengths, the positions are sent with K/V, and no hop is skipped.
      layout: order in which tokens are stored over `axis`, as by `ringattn.permute`: "contiguous", "striped" or
        "zigzag". The same for every strategy; a pair of axes counts as one axis of outer * inner devices.
      strategy: "ring"; "gather" (all-gathers K/V); "ulysses" (exchanges sequence shards for head shards); "usp"
        (ulysses inside a ring); "auto" (picks the strategy with the least exposed communication: `choose_strategy`).
      axis: a mesh axis, or a pair (outer, inner): a nested ring, or for "usp" a ring over outer and an exchange over
        inner.
      spec: PartitionSpec of query. Default: read from the array on an explicit mesh; P(None, axis) on an auto mesh,
        which replicates the batch and the heads.
      scale: default D ** -0.5.
      soft_cap: logits become soft_cap * tanh(logits / soft_cap). Default: no cap.
      sinks: one extra logit per head in the denominator, like a key whose value is 0.
      slopes: ALiBi slopes (arXiv 2108.12409), one per head.
      kernel: "xla", or "auto", which picks the fastest kernel for the device; at present always "xla".
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
    check_arrays(query, key, value, extras)
    for name, array in {"query's length L": query, "key's length M": key}.items():
        check_length(array.shape[1], layout, _size(mesh, settings.axes), name, " * ".join(settings.axes))
    spec = _resolve_spec(query, spec, mesh, settings.axes, key.shape[2])
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


def _resolve_spec(query: Array, spec: jax.P | None, mesh: AbstractMesh, axes: tuple[str, ...], kv_heads: int) -> jax.P:
    """Returns query's spec with an entry for each of its four dims, checked against the mesh and `axes`."""
    axis = axes[0] if len(axes) == 1 else axes
    if spec is None:
        entries = jax.typeof(query).sharding.spec if _is_explicit(mesh) else ()
        batch, _, heads, *_ = (*entries, None, None, None)
        spec = jax.P(batch, axis, heads)
    if len(spec) > 4:
        raise ValueError(f"spec={spec} has {len(spec)} entries, but query [B, L, H, D] has 4 dims; use at most 4")
    batch, length, heads, depth = (*spec, *([None] * (4 - len(spec))))
    if axis_names(length) != axes:
        raise ValueError(f"spec={spec} shards the sequence over {length!r}, but axis={axis!r}; they must agree")
    if depth is not None:
        raise ValueError(f"spec={spec} shards the head dim over {depth!r}, which attention cannot do; use None there")
    missing = [name for entry in (batch, heads) for name in axis_names(entry) if name not in mesh.axis_names]
    if missing:
        raise ValueError(f"spec={spec} names {missing[0]!r}, which must be one of the mesh axes {mesh.axis_names}")
    for name, size, entry in (("B", query.shape[0], batch), ("G", kv_heads, heads)):
        count = _size(mesh, axis_names(entry))
        if size % count:
            raise ValueError(
                f"{name}={size} must be a multiple of the {count} devices of {entry!r}; use a multiple, or another spec"
            )
    return jax.P(batch, axis, heads, None)


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
