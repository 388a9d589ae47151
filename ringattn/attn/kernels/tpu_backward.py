"""The backward Pallas kernel for TPUs: all gradients in one pass over the tiles.

A grid step has one tile of keys, for one K/V head. It visits the tiles of queries that see one of its keys, with the R
query heads of the K/V head. The gradients of the keys and values stay in VMEM. Those of the queries are fetched from
HBM, added to, and written back, while the next tile is fetched and computed. Logits are transposed, [keys, queries], so
that lse and delta are rows, as they are stored.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool

from ringattn.attn.kernels.protocol import KV, KVGrads, LogitSpec, Queries, Residuals, Slopes
from ringattn.attn.kernels.tpu_tiles import (
    LANES,
    LOG2_E,
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
from ringattn.attn.mask import Tokens, visible_pairs

SLOTS = 3
"""Tiles of queries in VMEM: one that is fetched, one in use, and one whose gradients are written back."""


class _Inputs(NamedTuple):
    """References that the kernel reads: the grid step's tile of keys and values; arrays of queries, in HBM."""

    query: Ref  # [B, G, R, L, D]
    d_out: Ref  # [B, G, R, L, Dv]
    lse: Ref  # [B, G, R, L]
    delta: Ref  # [B, G, R, L]
    q_ids: Ref  # None, or [rows, ids, L]
    key: Ref  # [keys, D]
    value: Ref  # [keys, Dv]
    kv_ids: Ref  # None, or [ids, keys]
    carry: Ref  # None, or [B, G, R, L, D], the same memory as the gradients of the queries


class _Grads(NamedTuple):
    """References that the kernel writes: gradients of queries in HBM, of the grid step's keys, and of the slopes."""

    query: Ref  # [B, G, R, L, D]
    key: Ref  # [keys, D]
    value: Ref  # [keys, Dv]
    slopes: Ref  # None, or [R, queries]: sums over the queries at the same place in their tile


class _Scratch(NamedTuple):
    """SLOTS tiles of queries, and the ids of the grid step's keys as columns."""

    query: Ref
    d_out: Ref
    lse: Ref
    delta: Ref
    q_ids: Ref  # or None
    d_query: Ref
    fetched: Ref
    written: Ref
    kv_ids: Ref  # or None


def backward(
    spec: LogitSpec,
    queries: Queries,
    kv: KV,
    slopes: Slopes | None,
    residuals: Residuals,
    carry: Array | None,
    sizes: tuple[int, int],
    interpret: bool,
) -> tuple[Array, Array | None, KVGrads]:
    """Returns the gradients of query, slopes and K/V.

    Args:
      queries: [B, groups, R, L, D]; `groups` is a multiple of the K/V heads, and adjacent groups share one.
      carry: [B, groups, R, L, D] float32, to which the gradients of the query are added; None: all zero.
      sizes: queries and keys in a tile; they divide the lengths.
      interpret: True to run in the interpreter.
    """
    (B, G, R, _, _), length, (q_size, kv_size) = queries.query.shape, kv.key.shape[2], sizes
    (q_side, q_spec), (kv_side, kv_spec) = sides(spec.mask, queries.tokens, kv.tokens, sizes)
    scalars, sharing = tables(q_side, kv_side, slopes), G // kv.key.shape[1]
    lse, delta, d_out = residuals[:3]
    inputs = _Inputs(queries.query, d_out, lse, delta, q_side.ids, kv.key, kv.value, kv_side.ids, carry)
    in_specs, out_specs = _specs(inputs, kv_size, _slopes_tile(R, q_size, G) if slopes is not None else None)
    shapes = _Grads(
        query=queries.query.shape,
        key=(B, G, *kv.key.shape[2:]),
        value=(B, G, *kv.value.shape[2:]),
        slopes=None if slopes is None else (B, G, R, q_size),
    )
    grads = pl.pallas_call(
        partial(_kernel, spec, (G, sharing), q_spec, kv_spec),
        out_shape=(_Grads(*(None if x is None else result(x, queries.query) for x in shapes)),),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B * G, length // kv_size),
            in_specs=[in_specs],
            out_specs=(out_specs,),
            scratch_shapes=[_scratch(inputs, q_spec, kv_spec)],
        ),
        input_output_aliases={} if carry is None else {len(jax.tree.leaves((scalars, inputs))) - 1: 0},
        name="ringattn_backward",
        **run_options(interpret),
    )(scalars, inputs)[0]
    d_slopes = None if grads.slopes is None else -grads.slopes.sum((0, 3))
    d_key, d_value = (x.reshape(B, -1, sharing, *x.shape[2:]).sum(2) for x in (grads.key, grads.value))
    return grads.query, d_slopes, KVGrads(d_key, d_value)


def _slopes_tile(heads: int, q_size: int, groups: int) -> pl.BlockSpec:
    return pl.BlockSpec((None, None, heads, q_size), lambda n, *_: (*row_and_group(n, groups), 0, 0))


def _specs(inputs: _Inputs, kv_size: int, slopes_tile: pl.BlockSpec | None) -> tuple[_Inputs, _Grads]:
    groups, kv_heads = inputs.query.shape[1], inputs.key.shape[1]
    hbm = pl.BlockSpec(memory_space=pl.ANY)

    def kv_tile(dim: int, sharing: int) -> pl.BlockSpec:
        def index(n: Scalar, j: Scalar, *_: Ref) -> tuple[Scalar | int, ...]:
            row, group = row_and_group(n, groups)
            return row, lax.div(group, jnp.int32(sharing)), j, 0

        return pl.BlockSpec((None, None, kv_size, dim), index)

    def ids_tile(ids: Array) -> pl.BlockSpec:
        shape = None, ids.shape[1], kv_size
        return pl.BlockSpec(shape, lambda n, j, *_: (ids_row(ids, row_and_group(n, groups)[0]), 0, j))

    key_dim, value_dim = inputs.key.shape[3], inputs.value.shape[3]
    in_specs = _Inputs(
        query=hbm,
        d_out=hbm,
        lse=hbm,
        delta=hbm,
        q_ids=None if inputs.q_ids is None else hbm,
        key=kv_tile(key_dim, groups // kv_heads),
        value=kv_tile(value_dim, groups // kv_heads),
        kv_ids=None if inputs.kv_ids is None else ids_tile(inputs.kv_ids),
        carry=None if inputs.carry is None else hbm,
    )
    return in_specs, _Grads(hbm, kv_tile(key_dim, 1), kv_tile(value_dim, 1), slopes_tile)


def _scratch(inputs: _Inputs, q_spec: SideSpec, kv_spec: SideSpec) -> _Scratch:
    slots = SLOTS, inputs.query.shape[2], q_spec.size
    return _Scratch(
        query=pltpu.VMEM((*slots, inputs.query.shape[4]), inputs.query.dtype),
        d_out=pltpu.VMEM((*slots, inputs.d_out.shape[4]), inputs.d_out.dtype),
        lse=pltpu.VMEM(slots, jnp.float32),
        delta=pltpu.VMEM(slots, jnp.float32),
        q_ids=None if inputs.q_ids is None else pltpu.VMEM((SLOTS, q_spec.ids, q_spec.size), jnp.int32),
        d_query=pltpu.VMEM((*slots, inputs.query.shape[4]), jnp.float32),
        fetched=pltpu.SemaphoreType.DMA((SLOTS, 6)),
        written=pltpu.SemaphoreType.DMA((SLOTS,)),
        kv_ids=None if inputs.kv_ids is None else pltpu.VMEM((kv_spec.ids, kv_spec.size, LANES), jnp.int32),
    )


def _kernel(
    spec: LogitSpec,
    groups: tuple[int, int],
    q_spec: SideSpec,
    kv_spec: SideSpec,
    tables: Tables,
    inputs: _Inputs,
    grads: _Grads,
    scratch: _Scratch,
) -> None:
    pairs = Pairs(spec, q_spec, kv_spec, tables, *row_and_group(pl.program_id(0), groups[0]), groups[1])
    _GridStep(pairs, pl.program_id(1), inputs, grads, scratch).run()


@dataclass(frozen=True)
class _GridStep:
    """Computes the gradients that are due to tile `j` of the keys."""

    pairs: Pairs
    j: Scalar
    inputs: _Inputs
    grads: _Grads
    scratch: _Scratch

    def run(self) -> None:
        first, stop = self.pairs.kv.range(self.pairs.tables.kv, self.pairs.row, self.j)
        if self.inputs.carry is None:
            pl.when(self.j == 0)(self.clear_unseen)

        def next_tile(i: Scalar) -> Scalar:
            return next_visible(lambda i: self.pairs.related(i, self.j)[0], i, stop)

        def visit(state: tuple[Scalar, Scalar]) -> tuple[Scalar, Scalar]:
            i, n = state
            slot, following = lax.rem(n, SLOTS), next_tile(i + 1)
            # The slot of the next tile is that of the visit before the last one.
            pl.when(n >= 2)(lambda: wait(self.write(i, lax.rem(n + 1, SLOTS))))
            pl.when(following < stop)(lambda: self.fetch(following, lax.rem(n + 1, SLOTS), start))
            self.fetch(i, slot, wait)
            pl.when(self.is_first(i))(lambda: self.clear(slot))
            self.pairs.run(i, self.j, partial(self.add_tile, i, slot))
            start(self.write(i, slot))
            return following, n + 1

        pl.when(first < stop)(lambda: self.fetch(first, jnp.int32(0), start))
        self.begin()
        _, visits = lax.while_loop(lambda state: state[0] < stop, visit, (first, jnp.int32(0)))
        for back in (2, 1):  # all gradients must be in HBM before the next grid step reads them
            pl.when(visits >= back)(lambda back=back: wait(self.write(first, lax.rem(visits - back, SLOTS))))
        self.grads.key[...] *= self.pairs.spec.scale

    def fetch(self, i: Scalar, slot: Scalar, action: Callable[[list[Any]], None]) -> None:
        """Starts the copies of tile i of the queries into VMEM, or waits for them."""
        inputs, ids, scratch = self.inputs, self.inputs.q_ids, self.scratch
        at = self.tokens_at(i)
        sources = [x.at[self.pairs.row, self.pairs.group, :, at] for x in (*inputs[:4], self.grads.query)]
        sources.insert(4, None if ids is None else ids.at[ids_row(ids, self.pairs.row), :, at])
        *rest, d_query = copies(sources, scratch[:6], scratch.fetched, slot)
        action(rest)
        pl.when(jnp.logical_not(self.is_first(i)))(lambda: action([d_query]))

    def is_first(self, i: Scalar) -> Bool[Array, ""]:
        """Returns True if no gradients of tile i of the queries are in HBM yet."""
        if self.inputs.carry is not None:
            return jnp.bool_(False)
        return self.pairs.q.range(self.pairs.tables.q, self.pairs.row, i)[0] == self.j

    def clear(self, slot: Scalar) -> None:
        """Sets the gradients of the queries in a slot to 0."""
        self.scratch.d_query[slot] = jnp.zeros(self.scratch.d_query.shape[1:], jnp.float32)

    def clear_unseen(self) -> None:
        """Sets the gradients of queries that see no key to 0."""
        self.clear(jnp.int32(0))

        @pl.loop(0, self.pairs.q.tiles)
        def _(i: Scalar) -> None:
            first, stop = self.pairs.q.range(self.pairs.tables.q, self.pairs.row, i)

            @pl.when(first == stop)
            def _():
                start(self.write(i, jnp.int32(0)))
                wait(self.write(i, jnp.int32(0)))

    def write(self, i: Scalar, slot: Scalar) -> list[Any]:
        """Returns the copy of the gradients of tile i of the queries to HBM."""
        target = self.grads.query.at[self.pairs.row, self.pairs.group, :, self.tokens_at(i)]
        return [pltpu.make_async_copy(self.scratch.d_query.at[slot], target, self.scratch.written.at[slot])]

    def tokens_at(self, i: Scalar) -> Any:
        size = self.pairs.q.size
        return pl.ds(pl.multiple_of(i * size, size), size)

    def begin(self) -> None:
        grads = self.grads
        grads.key[...] = jnp.zeros_like(grads.key)
        grads.value[...] = jnp.zeros_like(grads.value)
        if grads.slopes is not None:

            @pl.when(self.j == 0)
            def _():
                grads.slopes[...] = jnp.zeros_like(grads.slopes)

        for n in range(self.pairs.kv.ids):
            self.scratch.kv_ids[n] = columns(self.inputs.kv_ids[n])

    def add_tile(self, i: Scalar, slot: Scalar, masked: bool) -> None:
        """Adds the gradients that are due to tile i of the queries."""
        (spec, *_), scratch, grads = self.pairs, self.scratch, self.grads
        seen = distance = None
        if masked or grads.slopes is not None:
            q, k = self.tokens(i, slot)
            seen = visible_pairs(spec.mask, q, k) if masked else None
            distance = jnp.abs(q.positions - k.positions).astype(jnp.float32) if grads.slopes is not None else None
        key, value, heads = self.inputs.key[...], self.inputs.value[...], scratch.query.shape[1]
        for r in range(heads):
            query, d_out = scratch.query[slot, r], scratch.d_out[slot, r]
            lse, delta = scratch.lse[slot, r][None], scratch.delta[slot, r][None]
            logits, cap_gradient = base2_logits(spec, dot(key, query, (1, 1)), self.pairs.slope(r, heads), distance)
            logits = logits if seen is None else jnp.where(seen, logits, -jnp.inf)
            probs = jnp.exp2(logits - jnp.where(lse == -jnp.inf, 0.0, lse * LOG2_E))
            grads.value[...] += dot(probs.astype(d_out.dtype), d_out, (1, 0))
            d_logits = probs * (dot(value, d_out, (1, 1)) - delta)
            if grads.slopes is not None and distance is not None:
                grads.slopes[r] += (d_logits * distance).sum(0)
            d_products = (d_logits * cap_gradient).astype(query.dtype)
            grads.key[...] += dot(d_products, query, (1, 0))
            scratch.d_query[slot, r] += spec.scale * dot(d_products, key, (0, 0))

    def tokens(self, i: Scalar, slot: Scalar) -> tuple[Tokens, Tokens]:
        """Returns the tokens of tile i of the queries, along dim 1, and of the grid step's keys, along dim 0."""
        (_, q, kv, tables, row, *_), scratch = self.pairs, self.scratch
        shape = kv.size, q.size
        q_ids = [scratch.q_ids[slot, n][None] for n in range(q.ids)]
        kv_ids = [widen(scratch.kv_ids[n], q.size) for n in range(kv.ids)]
        return q.tokens(tables.q, row, i, q_ids, shape, 1), kv.tokens(tables.kv, row, self.j, kv_ids, shape, 0)
