"""The Pallas kernel for TPUs of a step of decoding: a few queries attend to one device's part of a cache.

It reads the keys and values of one layer once, directly from the stack of all layers. XLA would copy the layer out of
the stack. Tiles of slots that are not in use are neither fetched nor computed.
"""

from functools import partial

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from ringattn.attn.kernels.protocol import CachedKV, LogitSpec
from ringattn.attn.kernels.tiles import largest_divisor
from ringattn.attn.kernels.tpu_tiles import LANES, Ref, Scalar, dot, result, widen
from ringattn.attn.mask import Tokens, visible_pairs
from ringattn.attn.softmax import shifted_exp

TILE_BYTES = 2**20
"""Bytes of keys in a tile, at most. Two tiles of keys and of values are in VMEM."""
UNIT = 128
"""The number of slots in a tile is a multiple of this, or all of them."""


def tile_slots(slots: int, slot_bytes: int) -> int | None:
    """Returns the number of slots in a tile; None if the number of slots has no suitable divisor."""
    most = max(TILE_BYTES // slot_bytes, UNIT)
    if slots <= most:
        return slots
    return UNIT * largest_divisor(slots // UNIT, most // UNIT) if slots % UNIT == 0 else None


def decode(
    spec: LogitSpec,
    query: Float[Array, "rows G Q D"],
    positions: Int[Array, "rows B"],
    part: CachedKV,
    tile: int,
    interpret: bool,
) -> tuple[Float[Array, "rows G Q D"], Float[Array, "rows G Q lanes"]]:
    """Returns attention of Q queries per K/V head to the cached keys, and LANES copies of log-sum-exp; float32.

    Query q has positions[row, q // (Q // B)].
    `part.slots_in_use` [rows] are the numbers of slots, from the first on, that may hold a visible key.
    """
    (rows, G, Q, D), slots = query.shape, part.key.shape[3]
    scales = [x[:, :, :, None] for x in (part.key_scale, part.value_scale) if x is not None]
    out_shape = (result((rows, G, Q, D), query), result((rows, G, Q, LANES), query))
    in_specs, out_specs = _specs(Q, D, tile, bool(scales))
    return pl.pallas_call(
        partial(_kernel, spec, bool(scales)),
        out_shape=out_shape,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(rows, G, slots // tile),
            in_specs=in_specs,
            out_specs=out_specs,
            scratch_shapes=[
                pltpu.VMEM((Q, 1), jnp.int32),
                pltpu.VMEM((Q, D), jnp.float32),
                *[pltpu.VMEM((Q, LANES), jnp.float32)] * 2,
            ],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=pltpu.InterpretParams() if interpret else False,
        name="ringattn_decode",
    )(part.layer[None], part.slots_in_use, positions, query, part.positions[:, None], part.key, part.value, *scales)


def _specs(queries: int, dim: int, tile: int, scaled: bool) -> tuple[list[pl.BlockSpec], tuple[pl.BlockSpec, ...]]:
    """Returns the specs of the inputs and of the results. The grid is (rows, K/V heads, tiles)."""

    def tile_index(row: Scalar, step: Scalar, in_use: Ref) -> Scalar:
        """Stays at the last tile in use, so that the following ones are not fetched."""
        return jnp.minimum(step, jnp.maximum(in_use[row] - 1, 0) // tile)

    def kv_tile(row: Scalar, group: Scalar, step: Scalar, layer: Ref, in_use: Ref, _: Ref) -> tuple[Scalar | int, ...]:
        return layer[0], row, group, tile_index(row, step, in_use), 0

    def scale_tile(
        row: Scalar, group: Scalar, step: Scalar, layer: Ref, in_use: Ref, _: Ref
    ) -> tuple[Scalar | int, ...]:
        return layer[0], row, group, 0, tile_index(row, step, in_use)

    def ids_tile(row: Scalar, group: Scalar, step: Scalar, layer: Ref, in_use: Ref, _: Ref) -> tuple[Scalar | int, ...]:
        return row, 0, tile_index(row, step, in_use)

    def of_group(row: Scalar, group: Scalar, step: Scalar, layer: Ref, in_use: Ref, _: Ref) -> tuple[Scalar | int, ...]:
        return row, group, 0, 0

    kv_spec = pl.BlockSpec((None, None, None, tile, dim), kv_tile)
    scale_spec = pl.BlockSpec((None, None, None, 1, tile), scale_tile)
    ids = pl.BlockSpec((None, 1, tile), ids_tile)
    out, lse = (pl.BlockSpec((None, None, queries, width), of_group) for width in (dim, LANES))
    return [out, ids, kv_spec, kv_spec, *[scale_spec] * (2 * scaled)], (out, lse)


def _kernel(
    spec: LogitSpec,
    scaled: bool,
    layer: Ref,
    in_use: Ref,
    q_positions: Ref,
    query: Ref,
    positions: Ref,
    *refs: Ref,
):
    key, value, *rest = refs
    scales, (out, lse, column, acc, row_max, row_sum) = (rest[:2], rest[2:]) if scaled else ([], rest)
    row, step, tile = pl.program_id(0), pl.program_id(2), positions.shape[1]

    @pl.when(step == 0)
    def _():
        column[...] = _column(q_positions, row, query.shape[0])
        acc[...] = jnp.zeros_like(acc)
        row_sum[...] = jnp.zeros_like(row_sum)
        row_max[...] = jnp.full_like(row_max, -jnp.inf)

    @pl.when(step * tile < in_use[row])
    def _():
        q = query[...]
        logits = spec.scale * dot(q, key[...].astype(q.dtype), (1, 1))
        if scaled:
            logits = logits * scales[0][...].astype(jnp.float32)
        if spec.soft_cap is not None:
            logits = spec.soft_cap * jnp.tanh(logits / spec.soft_cap)
        seen = visible_pairs(spec.mask, Tokens(column[...]), Tokens(positions[...]))
        logits = jnp.where(seen, logits, -jnp.inf)
        new_max = jnp.maximum(row_max[...], jnp.broadcast_to(logits.max(1, keepdims=True), row_max.shape))
        weights = shifted_exp(logits, widen(new_max, logits.shape[1]))
        decay = shifted_exp(row_max[...], new_max)
        row_sum[...] = decay * row_sum[...] + jnp.broadcast_to(weights.sum(1, keepdims=True), row_sum.shape)
        if scaled:
            weights = weights * scales[1][...].astype(jnp.float32)
        added = dot(weights.astype(q.dtype), value[...].astype(q.dtype), (1, 0))
        acc[...] = widen(decay, acc.shape[1]) * acc[...] + added
        row_max[...] = new_max

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        total = row_sum[...]
        safe = jnp.where(total > 0, total, 1.0)
        out[...] = acc[...] / widen(safe, acc.shape[1])
        lse[...] = jnp.where(total > 0, row_max[...] + jnp.log(safe), -jnp.inf)


def _column(positions: Ref, row: Scalar, queries: int) -> Int[Array, "Q 1"]:
    """Returns the positions of a row's queries, from `positions` [rows, B]."""
    count = positions.shape[1]
    number = lax.broadcasted_iota(jnp.int32, (queries, 1), 0) // (queries // count)
    column = jnp.full((queries, 1), positions[row, 0])
    for query in range(1, count):
        column = jnp.where(number == query, positions[row, query], column)
    return column
