"""The backward Pallas kernel for TPUs: all gradients in one pass over the tiles.

A grid step has one tile of keys, for one K/V head. It visits the tiles of queries that see one of its keys, with the R
query heads of the K/V head. The gradients of the keys and values stay in VMEM. Those of the queries are fetched from
HBM, added to, and written back, while the next tile is fetched and computed; if they are to be rounded, the last visit
writes a tile to a second array. Logits are transposed, [keys, queries], so that lse and delta are rows, as stored.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool

from ringattn.attn.kernels.protocol import KV, KVGrads, LogitSpec, Queries, Residuals, Slopes
from ringattn.attn.kernels.tpu_backward_memory import SLOTS, Grads, Inputs, Scratch, scratch_tiles, specs
from ringattn.attn.kernels.tpu_tiles import (
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
from ringattn.attn.mask import Tokens, visible_pairs


def backward(
    spec: LogitSpec,
    queries: Queries,
    kv: KV,
    slopes: Slopes | None,
    residuals: Residuals,
    carry: Array | None,
    options: Options,
) -> tuple[Array, Array | None, KVGrads]:
    """Returns the gradients of query, in `options.dtype`, and those of slopes and K/V, in float32.

    Args:
      queries: [B, groups, R, L, D]; `groups` is a multiple of the K/V heads, and adjacent groups share one.
      carry: [B, groups, R, L, D] float32, to which the gradients of the query are added; None: all zero.
    """
    (B, G, R, _, _), length, (sizes, dtype, interpret) = queries.query.shape, kv.key.shape[2], options
    (q_side, q_spec), (kv_side, kv_spec) = sides(spec.mask, queries.tokens, kv.tokens, sizes)
    scalars, sharing = tables(q_side, kv_side, slopes), G // kv.key.shape[1]
    lse, delta, d_out = residuals[:3]
    inputs = Inputs(queries.query, d_out, lse, delta, q_side.ids, kv.key, kv.value, kv_side.ids, carry)
    # The kernel rounds in the memory of a tile of queries, hence to their dtype only; to others, XLA converts.
    rounded = dtype == queries.query.dtype and dtype != jnp.float32
    in_specs, out_specs = specs(inputs, sizes, rounded, slopes is not None)
    shapes = Grads(
        query=queries.query.shape,
        rounded=None,
        key=(B, G, *kv.key.shape[2:]),
        value=(B, G, *kv.value.shape[2:]),
        slopes=None if slopes is None else (B, G, R, sizes[0]),
    )
    types = Grads(*(None if x is None else result(x, queries.query) for x in shapes))
    grads = pl.pallas_call(
        partial(_kernel, spec, (G, sharing), q_spec, kv_spec),
        out_shape=(types._replace(rounded=result(shapes.query, queries.query, dtype) if rounded else None),),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B * G, length // sizes[1]),
            in_specs=[in_specs],
            out_specs=(out_specs,),
            scratch_shapes=[scratch_tiles(inputs, q_spec, kv_spec)],
        ),
        input_output_aliases={} if carry is None else {len(jax.tree.leaves((scalars, inputs))) - 1: 0},
        name="ringattn_backward",
        **run_options(interpret),
    )(scalars, inputs)[0]
    d_slopes = None if grads.slopes is None else -grads.slopes.sum((0, 3))
    d_key, d_value = (x.reshape(B, -1, sharing, *x.shape[2:]).sum(2) for x in (grads.key, grads.value))
    return grads.rounded if rounded else grads.query.astype(dtype), d_slopes, KVGrads(d_key, d_value)


def _kernel(
    spec: LogitSpec,
    groups: tuple[int, int],
    q_spec: SideSpec,
    kv_spec: SideSpec,
    tables: Tables,
    inputs: Inputs,
    grads: Grads,
    scratch: Scratch,
) -> None:
    pairs = Pairs(spec, q_spec, kv_spec, tables, *row_and_group(pl.program_id(0), groups[0]), groups[1])
    _GridStep(pairs, pl.program_id(1), inputs, grads, scratch).run()


@dataclass(frozen=True)
class _GridStep:
    """Computes the gradients that are due to tile `j` of the keys."""

    pairs: Pairs
    j: Scalar
    inputs: Inputs
    grads: Grads
    scratch: Scratch

    def run(self) -> None:
        first, stop = self.pairs.kv.range(self.pairs.tables.kv, self.pairs.row, self.j)
        if self.inputs.carry is None or self.grads.rounded is not None:  # otherwise, the carry is in place
            pl.when(self.j == 0)(self.write_unseen)

        def next_tile(i: Scalar) -> Scalar:
            return next_visible(lambda i: self.pairs.related(i, self.j)[0], i, stop)

        def visit(state: tuple[Scalar, ...]) -> tuple[Scalar, ...]:
            i, n, previous, before_previous = state
            slot, following = lax.rem(n, SLOTS), next_tile(i + 1)
            # The slot of the next tile is that of the visit before the last one.
            pl.when(n >= 2)(lambda: self.write(before_previous, lax.rem(n + 1, SLOTS), wait))
            pl.when(following < stop)(lambda: self.fetch(following, lax.rem(n + 1, SLOTS), start))
            self.fetch(i, slot, wait)
            pl.when(self.is_first(i))(lambda: self.clear(slot))
            self.pairs.run(i, self.j, partial(self.add_tile, i, slot))
            self.write(i, slot, start)
            return following, n + 1, i, previous

        pl.when(first < stop)(lambda: self.fetch(first, jnp.int32(0), start))
        self.begin()
        state = first, jnp.int32(0), first, first
        _, visits, previous, before_previous = lax.while_loop(lambda state: state[0] < stop, visit, state)
        for back, i in ((2, before_previous), (1, previous)):  # the next grid step reads all gradients from HBM
            pl.when(visits >= back)(lambda back=back, i=i: self.write(i, lax.rem(visits - back, SLOTS), wait))
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

    def write_unseen(self) -> None:
        """Writes the gradients of queries that see no key: those of the carry, or 0."""
        slot = jnp.int32(0)

        @pl.loop(0, self.pairs.q.tiles)
        def _(i: Scalar) -> None:
            first, stop = self.pairs.q.range(self.pairs.tables.q, self.pairs.row, i)

            @pl.when(first == stop)
            def _():
                if self.inputs.carry is None:
                    self.clear(slot)
                else:
                    source = self.grads.query.at[self.pairs.row, self.pairs.group, :, self.tokens_at(i)]
                    pltpu.sync_copy(source, self.scratch.d_query.at[slot])
                self.write(i, slot, start)
                self.write(i, slot, wait)

    def write(self, i: Scalar, slot: Scalar, action: Callable[[list[Any]], None]) -> None:
        """Starts the copy of the gradients of tile i of the queries to HBM, or waits for it.

        In the last visit of a tile whose gradients are to be rounded, rounds them into the slot's tile of queries,
        which is no longer needed, and copies that. Wait for the tile that was started: the two copies differ in size.
        """
        scratch, grads = self.scratch, self.grads
        at = self.pairs.row, self.pairs.group, slice(None), self.tokens_at(i)

        def copy(source: Ref, target: Ref) -> None:
            action([pltpu.make_async_copy(source.at[slot], target.at[at], scratch.written.at[slot])])

        if grads.rounded is None:
            return copy(scratch.d_query, grads.query)

        def copy_rounded() -> None:
            if action is start:
                scratch.query[slot] = scratch.d_query[slot].astype(scratch.query.dtype)
            copy(scratch.query, grads.rounded)

        complete = self.pairs.q.range(self.pairs.tables.q, self.pairs.row, i)[1] <= self.j + 1
        pl.when(complete)(copy_rounded)
        pl.when(jnp.logical_not(complete))(lambda: copy(scratch.d_query, grads.query))

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
