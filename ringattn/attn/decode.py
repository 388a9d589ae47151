"""Attention to a cache of K/V that is sharded over the devices, inside a shard_map.

A new token moves no K/V: every device attends with all queries to its part of the cache, and one small reduction merges
the partial results. Chunks of a prompt do the same, or rotate K/V around a ring, whichever costs less
(`moves_queries`; arXiv 2411.01783 calls these pass-Q and pass-KV).

Positions are given for every query and key. A key that no query sees, such as an unused slot of the cache, has the
position UNUSED; a query that sees no key has a negative one.
"""

from collections.abc import Callable, Sequence
from functools import partial, reduce

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax
from jaxtyping import Array, Float, Int

from ringattn.attn.inputs import Inputs, to_kernel_dims, ungroup_heads
from ringattn.attn.kernels.protocol import CachedKV, Kernel, LogitSpec, accumulation_dtype, matmul_precision
from ringattn.attn.kernels.registry import choose_kernel
from ringattn.attn.kernels.tpu_decode import decode as tpu_decode
from ringattn.attn.kernels.tpu_decode import tile_slots
from ringattn.attn.mask import Tokens, visible
from ringattn.attn.settings import Settings
from ringattn.attn.softmax import Partial, merge, normalize, shifted_exp, varying_like
from ringattn.attn.strategies import Strategies, device_kind, drop_unit_axes
from ringattn.hardware import platform

UNUSED = 2**30
"""Position of a slot without a key: later than every query."""
HIDDEN_QUERIES = 1024
"""With at least this many queries per device, compute hides the hops of a ring on v5e, v5p and H100 links."""


def decode_attention(
    spec: LogitSpec,
    query: Float[Array, "B H D"],
    positions: Int[Array, " B"],
    parts: Sequence[CachedKV],
    axes: tuple[str, ...],
    kernel: str = "auto",
) -> Float[Array, "B H D"]:
    """Attends with one query per row, equal on all devices of `axes`, to the keys of `parts` on all of these devices.

    Returns the output in query's dtype, equal on all devices.
    """
    grouped, found = rearrange(query, "B (G R) D -> B G R D", G=parts[0].key.shape[2]), []
    for part in parts:
        rows = part.key.shape[1]  # 1: the queries of all rows share the keys
        folded = rearrange(grouped, "(rows B) G R D -> rows G (B R) D", rows=rows)
        new = _attend_once(spec, folded, rearrange(positions, "(rows B) -> rows B", rows=rows), part, kernel)
        found.append([_unfold(x, query.shape[0]) for x in new])
    out, lse = found[0]
    if len(found) > 1:
        out, lse = reduce(merge, [Partial(out, lse[..., 0]) for out, lse in found])
        lse = lse[..., None]
    out = _merge_devices(out, lse, axes, lambda x: lax.psum(x, axes))
    return rearrange(out, "B G R D -> B (G R) D").astype(query.dtype)


def _attend_once(
    spec: LogitSpec, query: Float[Array, "rows G Q D"], positions: Int[Array, "rows B"], part: CachedKV, kernel: str
) -> tuple[Float[Array, "rows G Q D"], Float[Array, "rows G Q copies"]]:
    """Attends to all keys of one device at once: with the kernel for TPUs, or with two products of XLA.

    Queries are ordered (B R), for the R query heads of a K/V head. Returns the output and copies of log-sum-exp.
    """
    (_, kv_heads, shared, head_dim), slots = query.shape, part.key.shape[3]
    shape = {"heads": kv_heads * shared, "kv_heads": kv_heads, "head_dim": head_dim, "dtype": query.dtype}
    tile = tile_slots(slots, head_dim * part.key.dtype.itemsize)
    kind = device_kind()
    if choose_kernel(kernel, **shape, device_kind=kind).name == "pallas" and tile is not None:
        return tpu_decode(spec, query, positions, part, tile, interpret=platform(kind) != "tpu")
    part = part.sliced()
    f32 = accumulation_dtype(query.dtype)
    options = {"precision": matmul_precision(query.dtype), "preferred_element_type": f32}
    logits = spec.scale * jnp.einsum("rgqd,rgsd->rgqs", query, part.key[0].astype(query.dtype), **options)
    if part.key_scale is not None:
        logits = logits * part.key_scale[0].astype(f32)[:, :, None]
    if spec.soft_cap is not None:
        logits = spec.soft_cap * jnp.tanh(logits / spec.soft_cap)
    positions = jnp.repeat(positions, query.shape[2] // positions.shape[1], axis=1)
    seen = visible(spec.mask, Tokens(positions), Tokens(part.positions))
    logits = jnp.where(seen[:, None], logits, -jnp.inf)
    row_max = logits.max(-1)
    weights = shifted_exp(logits, row_max[..., None])
    row_sum = weights.sum(-1)
    if part.value_scale is not None:
        weights = weights * part.value_scale[0].astype(f32)[:, :, None]
    acc = jnp.einsum("rgqs,rgsd->rgqd", weights.astype(query.dtype), part.value[0].astype(query.dtype), **options)
    found = normalize(acc, row_sum, row_max)
    return found.out, found.lse[..., None]


def _unfold(x: Array, batch: int) -> Array:
    """Splits the queries of shared keys, [1, G, B * R, ...], into rows."""
    return x if x.shape[0] == batch else rearrange(x, "1 G (B R) ... -> B G R ...", B=batch)


def _merge_devices(
    out: Float[Array, "*dims D"], lse: Float[Array, "*dims copies"], axes: tuple[str, ...], total: Callable
) -> Array:
    """Returns the output of attention to the keys of all devices of `axes`; `total` sums a list of arrays over them.

    With D copies of log-sum-exp, as from the kernel for TPUs if D = 128, all operations are elementwise: a TPU needs
    half as many, and sends three numbers per element in place of one.
    """
    lse = lse if lse.shape == out.shape else lse[..., :1]
    weight = shifted_exp(lse, lax.pmax(lse, axes))
    weighted, weights = total([out * weight, weight])
    return weighted / jnp.where(weights > 0, weights, 1.0)


def chunk_attention(
    spec: LogitSpec,
    query: Float[Array, "B L H D"],
    positions: Int[Array, "B L"],
    parts: Sequence[CachedKV],
    axes: tuple[str, str],
    kernel: str = "auto",
) -> Float[Array, "B L H D"]:
    """Attends with local queries to the keys of `parts` on all devices of `axes`. Returns query's dtype."""
    q_heads, local = query.shape[2], query.shape[1]
    keys, kv_heads = sum(part.key.shape[3] for part in parts), parts[0].key.shape[2]
    axis = drop_unit_axes(axes)
    queries_move = moves_queries(local, keys, q_heads // kv_heads, jnp.dtype(query.dtype).itemsize)
    settings = Settings(
        mask=spec.mask,
        layout="striped",
        strategy="ring",
        axis=axis,
        scale=spec.scale,
        soft_cap=spec.soft_cap,
        kernel=kernel,
        reduce_dtype=None,
    )
    moved = [query, positions]
    if queries_move:
        moved = [lax.all_gather(x, axes, axis=1, tiled=True) for x in moved]
    found: Partial | None = None
    for part in parts:
        found = _continue(spec, settings, moved[0], moved[1], part, found, queries_move)
    assert found is not None
    if not queries_move:
        return ungroup_heads(found.out).astype(query.dtype)
    scatter = partial(lax.psum_scatter, axis_name=axes, scatter_dimension=3, tiled=True)
    out = _merge_devices(found.out, found.lse[..., None], axes, partial(jax.tree.map, scatter))
    return ungroup_heads(out).astype(query.dtype)


def moves_queries(queries: int, keys: int, shared_heads: int, itemsize: int) -> bool:
    """Returns True if queries and partial outputs are sent, False if K/V are.

    Args:
      queries, keys: number per device.
      shared_heads: number of query heads that share a K/V head.
      itemsize: bytes of an element of the queries.
    """
    return queries < HIDDEN_QUERIES and queries * shared_heads * (itemsize + 4) < keys * 2 * itemsize


def _continue(
    spec: LogitSpec,
    settings: Settings,
    query: Float[Array, "B L H D"],
    positions: Int[Array, "B L"],
    part: CachedKV,
    carry: Partial | None,
    on_device: bool,
) -> Partial:
    """Returns attention to the keys of `carry` and of `part`: on all devices, or `on_device` alone."""
    batch, rows = query.shape[0], part.key.shape[1]
    query = rearrange(query, "(rows B) L H D -> rows (B L) H D", rows=rows)
    positions = rearrange(positions, "(rows B) L -> rows (B L)", rows=rows)
    if carry is not None:
        carry = jax.tree.map(lambda x: rearrange(x, "(rows B) G R L ... -> rows G R (B L) ...", rows=rows), carry)
    part = part.sliced()
    pairs = (part.key, part.key_scale), (part.value, part.value_scale)
    key, value = (_dequantized(x[0], None if scale is None else scale[0], query) for x, scale in pairs)
    inputs = Inputs(query, key, value, Tokens(positions), Tokens(part.positions), None, None)
    inputs, carry = jax.tree.map(lambda x: varying_like(x, *jax.tree.leaves((inputs, carry))), (inputs, carry))

    def attend(kernel: Kernel, inputs: Inputs) -> Partial:
        queries, kv, _, _ = to_kernel_dims(inputs)
        return kernel.forward(spec, queries, kv, None, carry)

    strategies = Strategies(settings, settings.axis, None)
    found = attend(strategies.kernel(inputs), inputs) if on_device else strategies.choose(attend, inputs)(inputs)
    return jax.tree.map(lambda x: rearrange(x, "rows G R (B L) ... -> (rows B) G R L ...", B=batch // rows), found)


def _dequantized(x: Array, scale: Array | None, like: Array) -> Float[Array, "rows S G D"]:
    """Returns the cached `x` [rows, G, S, D] in the dtype of `like` and the dims of `attention`."""
    values = x.astype(like.dtype) if scale is None else x.astype(like.dtype) * scale.astype(like.dtype)[..., None]
    return rearrange(values, "rows G S D -> rows S G D")
