"""The forward Pallas kernel for TPUs.

A grid step has one tile of queries, with R query heads that share a K/V head. It visits the tiles of keys with a
visible key, and fetches the next one while it computes (FlashAttention-2, arXiv 2307.08691).
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from ringattn.attn.kernels.protocol import KV, LogitSpec, Queries, Slopes
from ringattn.attn.kernels.tpu_tiles import (
    LANES,
    LOG2_E,
    Options,
    Pairs,
    Ref,
    Scalar,
    SideSpec,
    Tables,
    base2_logits,
    columns,
    copies,
    dot,
    ids_row,
    next_visible,
    result,
    row_and_group,
    run_options,
    sides,
    start,
    tables,
    wait,
    widen,
)
from ringattn.attn.mask import visible_pairs
from ringattn.attn.softmax import Partial


class _Inputs(NamedTuple):
    """References that the kernel reads: the grid step's tile of queries; keys and values, in HBM."""

    query: Ref  # [R, queries, D]
    q_ids: Ref  # None, or [ids, queries]
    key: Ref  # [B, G, M, D]
    value: Ref  # [B, G, M, Dv]
    kv_ids: Ref  # None, or [rows, ids, M]
    carry: Any  # None, or as _Part


class _Part(NamedTuple):
    """References to the grid step's tile of a Partial."""

    out: Ref  # [R, queries, Dv]
    lse: Ref  # [R, queries]


class _Scratch(NamedTuple):
    """Two tiles of keys and values, and columns (see `tpu_tiles.columns`) of the tile of queries."""

    key: Ref
    value: Ref
    kv_ids: Ref  # or None
    semaphores: Ref
    acc: Ref  # [R, queries, Dv]
    row_max: Ref
    row_sum: Ref
    q_ids: Ref  # or None


def forward(
    spec: LogitSpec,
    queries: Queries,
    kv: KV,
    slopes: Slopes | None,
    carry: Partial | None,
    options: Options,
) -> Partial:
    """Returns attention to the keys of `carry` and of `kv` together.

    Args:
      queries: [B, groups, R, L, D]; `groups` is a multiple of the K/V heads, and adjacent groups share one.
      carry: results for earlier keys, with the same groups; None if there are none. Updated in place if it has the
        dtypes of the result.
    """
    query, (B, G, _, length, _), (sizes, dtype, interpret) = queries.query, queries.query.shape, options
    sharing = G // kv.key.shape[1]
    (q_side, q_spec), (kv_side, kv_spec) = sides(spec.mask, queries.tokens, kv.tokens, sizes)
    scalars = tables(q_side, kv_side, slopes)
    inputs = _Inputs(query, q_side.ids, kv.key, kv.value, kv_side.ids, carry and _Part(*carry))
    in_place = carry is not None and carry.out.dtype == dtype
    in_specs, out_specs = _specs(inputs, q_spec, in_place)
    last = len(jax.tree.leaves((scalars, inputs))) - 1
    part = pl.pallas_call(
        partial(_kernel, spec, (G, sharing), q_spec, kv_spec),
        out_shape=(_Part(result((*query.shape[:4], kv.value.shape[3]), query, dtype), result(query.shape[:4], query)),),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B * G, length // sizes[0]),
            in_specs=[in_specs],
            out_specs=(out_specs,),
            scratch_shapes=[_scratch(inputs, q_spec, kv_spec)],
        ),
        input_output_aliases={last - 1: 0, last: 1} if in_place else {},
        name="ringattn_forward",
        **run_options(interpret),
    )(scalars, inputs)[0]
    return Partial(*part)


def _specs(inputs: _Inputs, q_spec: SideSpec, in_place: bool) -> tuple[_Inputs, _Part]:
    _, groups, R, _, D = inputs.query.shape

    def held(n: Scalar, i: Scalar, scalars: Tables) -> tuple[Scalar, Scalar, Scalar]:
        row, group = row_and_group(n, groups)
        return row, group, q_spec.held(scalars.q, row, i)

    def q_tile(*dims: int, every: bool = False) -> pl.BlockSpec:
        def index(n: Scalar, i: Scalar, scalars: Tables) -> tuple[Scalar | int, ...]:
            row, group, tile = held(n, i, scalars)
            return row, group, 0, i if every else tile, *(0 for _ in dims)

        return pl.BlockSpec((None, None, R, q_spec.size, *dims), index)

    def ids_tile(*args: Any) -> tuple[Scalar | int, ...]:
        row, _, tile = held(*args)
        return ids_row(inputs.q_ids, row), 0, tile

    hbm = pl.BlockSpec(memory_space=pl.ANY)
    # Tiles without visible keys keep their carry in place; elsewhere, every tile is written.
    part = _Part(q_tile(inputs.value.shape[3], every=not in_place), q_tile(every=not in_place))
    in_specs = _Inputs(
        query=q_tile(D),
        q_ids=None if inputs.q_ids is None else pl.BlockSpec((None, q_spec.ids, q_spec.size), ids_tile),
        key=hbm,
        value=hbm,
        kv_ids=None if inputs.kv_ids is None else hbm,
        carry=None if inputs.carry is None else part,
    )
    return in_specs, part


def _scratch(inputs: _Inputs, q_spec: SideSpec, kv_spec: SideSpec) -> _Scratch:
    columns = inputs.query.shape[2], q_spec.size, LANES
    acc = *columns[:2], inputs.value.shape[3]
    return _Scratch(
        key=pltpu.VMEM((2, kv_spec.size, inputs.key.shape[3]), inputs.key.dtype),
        value=pltpu.VMEM((2, kv_spec.size, inputs.value.shape[3]), inputs.value.dtype),
        kv_ids=None if inputs.kv_ids is None else pltpu.VMEM((2, kv_spec.ids, kv_spec.size), jnp.int32),
        semaphores=pltpu.SemaphoreType.DMA((2, 3)),
        acc=pltpu.VMEM(acc, jnp.float32),
        row_max=pltpu.VMEM(columns, jnp.float32),
        row_sum=pltpu.VMEM(columns, jnp.float32),
        q_ids=None if inputs.q_ids is None else pltpu.VMEM((q_spec.ids, q_spec.size, LANES), jnp.int32),
    )


def _kernel(
    spec: LogitSpec,
    groups: tuple[int, int],
    q_spec: SideSpec,
    kv_spec: SideSpec,
    tables: Tables,
    inputs: _Inputs,
    out: _Part,
    scratch: _Scratch,
) -> None:
    pairs = Pairs(spec, q_spec, kv_spec, tables, *row_and_group(pl.program_id(0), groups[0]), groups[1])
    _GridStep(pairs, pl.program_id(1), inputs, out, scratch).run()


@dataclass(frozen=True)
class _GridStep:
    """Computes attention of tile `i` of the queries."""

    pairs: Pairs
    i: Scalar
    inputs: _Inputs
    out: _Part
    scratch: _Scratch

    @property
    def heads(self) -> int:
        return self.inputs.query.shape[0]

    @property
    def in_place(self) -> bool:
        return self.inputs.carry is not None and self.inputs.carry.out.dtype == self.out.out.dtype

    def run(self) -> None:
        first, stop = self.pairs.q.range(self.pairs.tables.q, self.pairs.row, self.i)

        def next_tile(j: Scalar) -> Scalar:
            return next_visible(lambda j: self.pairs.related(self.i, j)[0], j, stop)

        def visit(state: tuple[Scalar, Scalar]) -> tuple[Scalar, Scalar]:
            j, slot = state
            following = next_tile(j + 1)
            pl.when(following < stop)(lambda: start(self.fetch(following, 1 - slot)))
            wait(self.fetch(j, slot))
            self.pairs.run(self.i, j, partial(self.add_tile, j, slot))
            return following, 1 - slot

        # If the result is in place, Pallas writes a tile without visible keys only if all others have none either.
        held = self.pairs.q.held(self.pairs.tables.q, self.pairs.row, self.i) if self.in_place else self.i

        @pl.when((first == stop) & (self.i == held))
        def _():
            self.keep()

        @pl.when(first < stop)
        def _():
            start(self.fetch(first, jnp.int32(0)))
            self.begin()
            lax.while_loop(lambda state: state[0] < stop, visit, (first, jnp.int32(0)))
            self.end()

    def fetch(self, j: Scalar, slot: Scalar) -> list:
        """Returns the copies of tile j of the keys into VMEM."""
        inputs, row, head = self.inputs, self.pairs.row, self.pairs.kv_head
        at = pl.ds(pl.multiple_of(j * self.pairs.kv.size, self.pairs.kv.size), self.pairs.kv.size)
        ids = None if inputs.kv_ids is None else inputs.kv_ids.at[ids_row(inputs.kv_ids, row), :, at]
        sources = inputs.key.at[row, head, at], inputs.value.at[row, head, at], ids
        return copies(sources, self.scratch[:3], self.scratch.semaphores, slot)

    def keep(self) -> None:
        """Writes the results of earlier keys."""
        carry, (out, lse) = self.inputs.carry, self.out
        if carry is None:
            out[...], lse[...] = jnp.zeros_like(out), jnp.full_like(lse, -jnp.inf)
        else:
            out[...], lse[...] = carry.out[...].astype(out.dtype), carry.lse[...]

    def begin(self) -> None:
        """Begins from the results of earlier keys: a normalized Partial is an online softmax with row_sum 1."""
        carry, scratch = self.inputs.carry, self.scratch
        for r in range(self.heads):
            if carry is None:
                scratch.row_max[r] = jnp.full_like(scratch.row_max[r], -jnp.inf)
                scratch.row_sum[r] = jnp.zeros_like(scratch.row_sum[r])
                scratch.acc[r] = jnp.zeros_like(scratch.acc[r])
            else:
                lse = columns(carry.lse[r])
                scratch.row_max[r] = lse * LOG2_E
                scratch.row_sum[r] = jnp.where(lse == -jnp.inf, 0.0, 1.0)
                scratch.acc[r] = carry.out[r]
        for n in range(self.pairs.q.ids):
            scratch.q_ids[n] = columns(self.inputs.q_ids[n])

    def add_tile(self, j: Scalar, slot: Scalar, masked: bool) -> None:
        """Adds tile j of the keys to the online softmax of each head."""
        (spec, q_spec, kv_spec, tables, row, *_), scratch, acc = self.pairs, self.scratch, self.scratch.acc
        shape, has_slopes = (q_spec.size, kv_spec.size), tables.slopes is not None
        seen = distance = None
        if masked or has_slopes:
            q_ids = [widen(scratch.q_ids[n], kv_spec.size) for n in range(q_spec.ids)]
            kv_ids = [scratch.kv_ids[slot, n][None] for n in range(kv_spec.ids)]
            q = q_spec.tokens(tables.q, row, self.i, q_ids, shape, 0)
            k = kv_spec.tokens(tables.kv, row, j, kv_ids, shape, 1)
            seen = visible_pairs(spec.mask, q, k) if masked else None
            distance = jnp.abs(q.positions - k.positions).astype(jnp.float32) if has_slopes else None
        key, value = scratch.key[slot], scratch.value[slot]
        for r in range(self.heads):
            products = dot(self.inputs.query[r], key, (1, 1))
            logits, _ = base2_logits(spec, products, self.pairs.slope(r, self.heads), distance)
            logits = logits if seen is None else jnp.where(seen, logits, -jnp.inf)
            old_max = scratch.row_max[r]
            new_max = jnp.maximum(old_max, logits.max(1, keepdims=True))
            # A shift of -inf would make the weights of a query without keys NaN.
            shift = jnp.where(new_max == -jnp.inf, 0.0, new_max)
            weights, decay = jnp.exp2(logits - widen(shift, kv_spec.size)), jnp.exp2(old_max - shift)
            weighted = dot(weights.astype(value.dtype), value, (1, 0))
            acc[r] = acc[r] * widen(decay, acc.shape[-1]) + weighted
            scratch.row_sum[r] = scratch.row_sum[r] * decay + weights.sum(1, keepdims=True)
            scratch.row_max[r] = new_max

    def end(self) -> None:
        """Normalizes: see `softmax.normalize`."""
        out, lse = self.out

        def nonzero(row_sum: Array) -> Array:
            return jnp.where(row_sum > 0.0, row_sum, 1.0)

        for r in range(self.heads):
            sums, maxima = self.scratch.row_sum[r], self.scratch.row_max[r]
            out[r] = (self.scratch.acc[r] * widen(1.0 / nonzero(sums), out.shape[-1])).astype(out.dtype)
            row_sum, row_max = sums.T[0], maxima.T[0]
            lse[r] = jnp.where(row_sum > 0.0, (row_max + jnp.log2(nonzero(row_sum))) * (1 / LOG2_E), -jnp.inf)
