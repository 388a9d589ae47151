"""Code that the two Pallas kernels for TPUs share: tables of tiles, and operations on tiles.

A kernel reads the bounds of two tiles from scalar memory, and decides whether any query of the one sees any key of the
other (`mask.relate`). If not, the tile is neither fetched nor computed. The tables take O(tiles) memory.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from ringattn.attn.kernels.protocol import LogitSpec, Slopes, matmul_precision
from ringattn.attn.kernels.tiles import relate_tiles, tile_bounds
from ringattn.attn.mask import Bounds, IdBounds, Mask, Tokens, relate

LANES = 128
"""Elements in a row of a TPU's vector register."""
LOG2_E = math.log2(math.e)
Ref = Any
"""A Pallas reference to memory."""
Scalar = Int[Array, ""]


class Options(NamedTuple):
    """Options of a kernel call."""

    sizes: tuple[int, int]
    """Queries and keys in a tile; they divide the lengths."""
    dtype: DTypeLike
    """Dtype of the output (forward) or of the query gradients (backward)."""
    interpret: bool
    """True to run in the interpreter."""


class Side(NamedTuple):
    """The tokens of the queries or of the keys, as a kernel takes them."""

    table: Int[Array, " entries"]
    """Bounds, first position, range of tiles of the other side, and tile to hold: [rows, fields, tiles], flat."""
    ids: Int[Array, "rows fields tokens"] | None
    """Positions (unless `SideSpec.step` gives them), segments and spans; None if the mask reads none of them."""


@dataclass(frozen=True)
class SideSpec:
    """The static part of a Side.

    Attributes:
      tiles, size: number of tiles, and tokens per tile.
      rows: rows of the batch in the table; 1 if all rows have the same.
      step: difference between the positions of consecutive tokens of a tile; None if positions are an id.
      segments, spans: True if the ids have them.
    """

    tiles: int
    size: int
    rows: int
    step: int | None
    segments: bool
    spans: bool

    @property
    def ids(self) -> int:
        """Number of ids per token."""
        return (self.step is None) + self.segments + self.spans

    @property
    def fields(self) -> int:
        """Number of fields per tile: the bounds, then those of `_side`."""
        return 2 + 3 * self.segments + 3 * self.spans + 4

    def read(self, table: Ref, row: Scalar, field: int, tile: Scalar) -> Scalar:
        """Returns one field of a tile."""
        first = row * self.fields * self.tiles if self.rows > 1 else 0
        return table[first + field * self.tiles + tile]

    def bounds(self, table: Ref, row: Scalar, tile: Scalar) -> Bounds:
        """Returns the bounds of a tile."""
        values = (self.read(table, row, n, tile) for n in range(self.fields - 4))

        def id_bounds() -> IdBounds:
            return IdBounds(next(values), next(values), next(values) != 0)

        first, last = next(values), next(values)
        return Bounds(first, last, id_bounds() if self.segments else None, id_bounds() if self.spans else None)

    def range(self, table: Ref, row: Scalar, tile: Scalar) -> tuple[Scalar, Scalar]:
        """Returns the first tile of the other side that a tile sees, and the one after the last. Both 0 if none."""
        return self.read(table, row, self.fields - 3, tile), self.read(table, row, self.fields - 2, tile)

    def held(self, table: Ref, row: Scalar, tile: Scalar) -> Scalar:
        """Returns the tile to hold in VMEM in the grid step of `tile`.

        Itself if it sees a tile of the other side; otherwise the next one that does, or the last one, or 0 if there is
        none. Pallas fetches and writes a tile only where the index changes, so nothing is moved for the others.
        """
        return self.read(table, row, self.fields - 1, tile)

    def tokens(
        self, table: Ref, row: Scalar, tile: Scalar, ids: list[Array], shape: tuple[int, int], dim: int
    ) -> Tokens:
        """Returns the tokens of a tile, which lie along `dim` of logits of `shape`. `ids` broadcast to this shape."""
        ids = list(ids)
        if self.step is None:
            positions = ids.pop(0)
        else:
            first = self.read(table, row, self.fields - 4, tile)
            positions = first + self.step * lax.broadcasted_iota(jnp.int32, shape, dim)
        segments = ids.pop(0) if self.segments else None
        return Tokens(positions, segments, ids.pop(0) if self.spans else None)


def sides(
    mask: Mask, q: Tokens, kv: Tokens, sizes: tuple[int, int]
) -> tuple[tuple[Side, SideSpec], tuple[Side, SideSpec]]:
    """Returns the queries' and the keys' side, for tiles of `sizes` tokens."""
    # Ids that the mask does not read, or that only one side has, restrict nothing.
    segments = q.segments is not None and kv.segments is not None
    spans = q.spans is not None and kv.spans is not None and mask.causal
    q, kv = (x._replace(segments=x.segments if segments else None, spans=x.spans if spans else None) for x in (q, kv))
    q_bounds, kv_bounds = (tile_bounds(x, size) for x, size in zip((q, kv), sizes, strict=True))
    empty, _ = relate_tiles(mask, q_bounds, kv_bounds)
    return _side(q, q_bounds, ~empty, sizes[0]), _side(kv, kv_bounds, ~empty.swapaxes(1, 2), sizes[1])


def _side(tokens: Tokens, tile_bounds: Bounds, seen: Array, size: int) -> tuple[Side, SideSpec]:
    """Returns a Side. `seen` [rows, tiles, tiles of the other side] is reduced, and never stored."""
    others = seen.shape[2]
    index = lax.broadcasted_iota(jnp.int32, seen.shape, 2)
    first = jnp.where(seen, index, others).min(2)
    stop = jnp.where(seen, index + 1, 0).max(2)
    starts, tile = tokens.positions[:, ::size], lax.broadcasted_iota(jnp.int32, stop.shape, 1)
    following = lax.cummin(jnp.where(stop > 0, tile, tile.shape[1]), axis=1, reverse=True)
    last = jnp.where(stop > 0, tile, 0).max(1, keepdims=True)
    fields = [*jax.tree.leaves(tile_bounds), starts, jnp.minimum(first, stop), stop, jnp.minimum(following, last)]
    rows, tiles = max(x.shape[0] for x in fields), starts.shape[1]
    table = jnp.stack([jnp.broadcast_to(x.astype(jnp.int32), (rows, tiles)) for x in fields], 1).reshape(-1)
    step = tokens.runs.step if tokens.runs and tokens.runs.length % size == 0 else None
    spec = SideSpec(tiles, size, rows, step, tokens.segments is not None, tokens.spans is not None)
    arrays = [x for x in (None if step else tokens.positions, tokens.segments, tokens.spans) if x is not None]
    if not arrays:
        return Side(table, None), spec
    ids = [jnp.broadcast_to(x, (max(x.shape[0] for x in arrays), x.shape[1])) for x in arrays]
    return Side(table, jnp.stack(ids, 1)), spec


class Tables(NamedTuple):
    """Arrays in scalar memory: those of both Sides, and slopes [G * R]."""

    q: Ref
    kv: Ref
    slopes: Ref  # or None


class Pairs(NamedTuple):
    """The pairs of tiles in one row of the batch and one group of heads, as a kernel sees them."""

    spec: LogitSpec
    q: SideSpec
    kv: SideSpec
    tables: Tables
    row: Scalar
    group: Scalar
    sharing: int

    @property
    def kv_head(self) -> Scalar:
        """The K/V head of the group; `sharing` groups have the same."""
        return lax.div(self.group, jnp.int32(self.sharing))

    def related(self, i: Scalar, j: Scalar) -> tuple[Array, Array]:
        """Returns (empty, full) of tile i of the queries and tile j of the keys."""
        q, kv = self.q.bounds(self.tables.q, self.row, i), self.kv.bounds(self.tables.kv, self.row, j)
        return relate(self.spec.mask, q, kv)

    def run(self, i: Scalar, j: Scalar, step: Callable[[bool], None]) -> None:
        """Calls step(masked): with masked=False if every query of tile i sees every key of tile j."""
        if self.spec.mask == Mask(False) and not self.q.segments:
            return step(False)
        _, full = self.related(i, j)
        pl.when(full)(lambda: step(False))
        pl.when(jnp.logical_not(full))(lambda: step(True))

    def slope(self, head: int, heads: int) -> Float[Array, ""] | None:
        """Returns the ALiBi slope of a query head of the group."""
        return None if self.tables.slopes is None else self.tables.slopes[self.group * heads + head]


def tables(q: Side, kv: Side, slopes: Slopes | None) -> Tables:
    """Returns the arrays that a kernel reads from scalar memory."""
    return Tables(q.table, kv.table, None if slopes is None else slopes.reshape(-1).astype(jnp.float32))


def next_visible(is_empty: Callable[[Scalar], Array], tile: Scalar, stop: Scalar) -> Scalar:
    """Returns the first tile >= `tile` that is not empty; `stop` without such a tile. Requires stop > 0."""
    return lax.while_loop(lambda n: (n < stop) & is_empty(jnp.minimum(n, stop - 1)), lambda n: n + 1, tile)


def dot(a: Array, b: Array, contract: tuple[int, int]) -> Array:
    """Contracts dim contract[0] of a with contract[1] of b, with accumulation in float32."""
    options = {"precision": matmul_precision(a.dtype), "preferred_element_type": jnp.float32}
    return lax.dot_general(a, b, ((contract[:1], contract[1:]), ((), ())), **options)


def columns(x: Array) -> Array:
    """Returns a row [n] as columns [n, LANES] that are all equal, as vector registers hold one number per row."""
    return jnp.broadcast_to(x[None], (LANES, x.shape[0])).T


def widen(x: Array, size: int) -> Array:
    """Returns equal columns [n, LANES] as [n, size]."""
    if size % LANES:
        return x[:, :size] if size < LANES else jnp.broadcast_to(x[:, :1], (x.shape[0], size))
    return x if size == LANES else jnp.tile(x, (1, size // LANES))


def base2_logits(
    spec: LogitSpec, products: Array, slope: Float[Array, ""] | None, distance: Array | None
) -> tuple[Array, Array | float]:
    """Returns log2(e) * logits, because TPUs have an instruction for powers of 2, and the derivative of the soft cap.

    Args:
      products: q.k of a tile.
      slope, distance: ALiBi slope of the head, and |p_i - p_j| of the tile.
    """
    cap_gradient = 1.0
    if spec.soft_cap is None:
        logits = products * (spec.scale * LOG2_E)
    else:
        capped = jnp.tanh(products * (spec.scale / spec.soft_cap))
        logits, cap_gradient = (spec.soft_cap * LOG2_E) * capped, 1.0 - jnp.square(capped)
    if slope is not None:
        assert distance is not None
        logits = logits - (slope * LOG2_E) * distance
    return logits, cap_gradient


def copies(sources: Sequence[Ref], buffers: tuple[Ref, ...], semaphores: Ref, slot: Scalar) -> list[Any]:
    """Returns the copies of the sources that are not None into `slot` of their buffers."""
    pairs = [(source, buffer) for source, buffer in zip(sources, buffers, strict=True) if source is not None]
    return [
        pltpu.make_async_copy(source, buffer.at[slot], semaphores.at[slot, n])
        for n, (source, buffer) in enumerate(pairs)
    ]


def start(transfers: list[Any]) -> None:
    """Starts the copies."""
    for transfer in transfers:
        transfer.start()


def wait(transfers: list[Any]) -> None:
    """Waits for the copies."""
    for transfer in transfers:
        transfer.wait()


def row_and_group(n: Scalar, groups: int) -> tuple[Scalar, Scalar]:
    """Returns the row of the batch and the group of heads of index n along the first dim of a grid."""
    return lax.div(n, jnp.int32(groups)), lax.rem(n, jnp.int32(groups))


def ids_row(ids: Ref, row: Scalar) -> Scalar | int:
    """Returns the row of `ids` [rows or 1, ...] that row `row` of the batch has."""
    return row if ids.shape[0] > 1 else 0


def result(shape: tuple[int, ...], x: Array, dtype: DTypeLike = jnp.float32) -> jax.ShapeDtypeStruct:
    """Returns the type of a kernel's result, which varies over the mesh axes over which x varies."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(x).manual_axis_type)


def run_options(interpret: bool) -> dict[str, Any]:
    """Returns options of pallas_call for a grid (rows * groups, tiles).

    The first dim is parallel: on chips with two cores (v4, v5p) each takes half of it.
    """
    return {
        "compiler_params": pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        "interpret": pltpu.InterpretParams() if interpret else False,
    }
