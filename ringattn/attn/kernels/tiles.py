"""Splits queries and keys into tiles, and visits only the pairs of tiles in which some query sees some key."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Int

from ringattn.attn.kernels.protocol import KV, Queries
from ringattn.attn.mask import Bounds, Mask, Tokens, bounds, relate

State = TypeVar("State")
"""Pytree that a loop over pairs of tiles updates."""

MAX_LOGITS = 2**20
"""Target for rows * heads * q_tile * kv_tile; exceeded if one batch row alone is larger."""


class TilePair(NamedTuple):
    """A tile of queries and a tile of keys in `rows` rows of the batch: sizes, and start indices in the full arrays."""

    first_row: Int[Array, ""]
    first_query: Int[Array, ""]
    first_key: Int[Array, ""]
    rows: int
    queries: int
    keys: int

    def q_tile(self, x: Array) -> Array:
        """Returns the tile [rows, G, R, queries, ...] of x [B, G, R, L, ...]."""
        return self._tile(x, 3, self.first_query, self.queries)

    def kv_tile(self, x: Array) -> Array:
        """Returns the tile [rows, G, keys, ...] of x [B, G, M, ...]."""
        return self._tile(x, 2, self.first_key, self.keys)

    def set_q_tile(self, x: Array, tile: Array) -> Array:
        """Returns x with its tile of queries replaced."""
        return lax.dynamic_update_slice(x, tile, self._start(x, 3, self.first_query))

    def set_kv_tile(self, x: Array, tile: Array) -> Array:
        """Returns x with its tile of keys replaced."""
        return lax.dynamic_update_slice(x, tile, self._start(x, 2, self.first_key))

    def tokens(self, queries: Queries, kv: KV) -> tuple[Tokens, Tokens]:
        """Returns the tokens of the two tiles, [rows or 1, queries] and [rows or 1, keys]."""
        return (
            jax.tree.map(lambda x: self._tile(x, 1, self.first_query, self.queries), queries.tokens),
            jax.tree.map(lambda x: self._tile(x, 1, self.first_key, self.keys), kv.tokens),
        )

    def _tile(self, x: Array, dim: int, first: Int[Array, ""], size: int) -> Array:
        rows = min(x.shape[0], self.rows)  # positions that a layout implies have one row for the whole batch
        return lax.dynamic_slice(x, self._start(x, dim, first), (rows, *x.shape[1:dim], size, *x.shape[dim + 1 :]))

    def _start(self, x: Array, dim: int, first: Int[Array, ""]) -> tuple[Int[Array, ""], ...]:
        zero = jnp.int32(0)
        row = zero if x.shape[0] == 1 else self.first_row
        return (row, *([zero] * (dim - 1)), first, *([zero] * (x.ndim - dim - 1)))


class TilePlan(NamedTuple):
    """The tiles of queries and keys with the bounds of their tokens, from which it follows which pairs are visited.

    Takes O(tiles) memory: the pairs of one tile of queries are compared when that tile is reached.
    """

    mask: Mask
    q_bounds: Bounds
    """Bounds [rows of the batch or 1, tiles of queries]."""
    kv_bounds: Bounds
    """Bounds [rows of the batch or 1, tiles of keys]."""
    counts: tuple[int, int, int]
    """Number of tiles along the batch, the queries and the keys."""
    sizes: tuple[int, int, int]
    """Size of a tile: rows, queries, keys."""

    def visit(self, step: Callable[[TilePair, State, bool], State], state: State) -> State:
        """Folds `step(pair, state, masked)` over the pairs with a visible key.

        Visits the tiles of queries in order; for each, first the pairs in which every query sees every key, without a
        mask, then the other pairs.
        """
        rows, queries, keys = self.sizes

        def visit_q_tile(n: Int[Array, ""], state: State) -> State:
            row, i = jnp.unravel_index(n, self.counts[:2])
            empty, full = self._related(row, i)
            order = jnp.argsort(jnp.where(empty, 2, jnp.where(full, 0, 1)), stable=True).astype(jnp.int32)

            def visit_one(masked: bool, m: Int[Array, ""], state: State) -> State:
                return step(TilePair(row * rows, i * queries, order[m] * keys, *self.sizes), state, masked)

            unmasked, visited = full.sum(dtype=jnp.int32), (~empty).sum(dtype=jnp.int32)
            state = lax.fori_loop(jnp.zeros_like(visited), unmasked, partial(visit_one, False), state)
            return lax.fori_loop(unmasked, visited, partial(visit_one, True), state)

        return lax.fori_loop(jnp.int32(0), self.counts[0] * self.counts[1], visit_q_tile, state)

    def if_any(self, f: Callable[[State], State], state: State) -> State:
        """Returns f(state), or state if no pair is visited.

        Wrapping f in a loop makes it one operation for XLA's scheduler. Otherwise the scheduler may place the start of
        a transfer just before the last small operation of f, leaving it exposed.
        """
        empty, _ = relate_tiles(self.mask, self.q_bounds, self.kv_bounds)
        any_visible = (~empty).any().astype(jnp.int32)
        return lax.fori_loop(jnp.zeros_like(any_visible), any_visible, lambda _, s: f(s), state)

    def _related(self, row: Int[Array, ""], i: Int[Array, ""]) -> tuple[Bool[Array, " pairs"], Bool[Array, " pairs"]]:
        """Returns (empty, full) of the pairs of tile i of the queries, in the rows of row tile `row`."""

        def rows_of(x: Array) -> Array:
            return x if x.shape[0] == 1 else lax.dynamic_slice_in_dim(x, row * self.sizes[0], self.sizes[0])

        q = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(rows_of(x), i, 1, axis=1), self.q_bounds)
        empty, full = relate(self.mask, q, jax.tree.map(rows_of, self.kv_bounds))
        return empty.all(0), full.all(0)


def plan_tiles(mask: Mask, queries: Queries, kv: KV, tile: tuple[int, int]) -> TilePlan:
    """Splits queries and keys into tiles of at most `tile` (queries, keys), and finds the bounds of their tokens."""
    (B, G, R, length, _), kv_length = queries.query.shape, kv.key.shape[2]
    q_size, kv_size = tile_sizes(length, kv_length, tile)
    rows = largest_divisor(B, max(MAX_LOGITS // (G * R * q_size * kv_size), 1))
    q_bounds, kv_bounds = tile_bounds(queries.tokens, q_size), tile_bounds(kv.tokens, kv_size)
    return TilePlan(
        mask, q_bounds, kv_bounds, (B // rows, length // q_size, kv_length // kv_size), (rows, q_size, kv_size)
    )


def tile_bounds(tokens: Tokens, size: int) -> Bounds:
    """Returns the bounds [rows, tiles] of all tiles of `size` tokens."""
    return bounds(jax.tree.map(lambda x: x.reshape(x.shape[0], -1, size), tokens))


def relate_tiles(
    mask: Mask, q: Bounds, k: Bounds
) -> tuple[Bool[Array, "_ q_tiles kv_tiles"], Bool[Array, "_ q_tiles kv_tiles"]]:
    """Returns (empty, full) of all pairs of tiles. Reduce them at once: they take O(tiles^2) memory."""
    return relate(mask, jax.tree.map(lambda x: x[:, :, None], q), jax.tree.map(lambda x: x[:, None], k))


def tile_size(length: int, max_size: int, multiple: int = 1) -> int:
    """Returns the tile size: the largest divisor <= max_size of length / 2, or of length if it is odd.

    Tiles do not cross the middle of a shard. The two halves of a zigzag shard are far apart in the sequence, so the
    position bounds of a tile with tokens of both halves would be too wide to skip any pair. If no such size is a
    multiple of `multiple`, tiles may cross the middle.
    """
    half = length // 2 if length % 2 == 0 else length
    return largest_divisor(half, max_size, multiple) or largest_divisor(length, max_size, multiple)


def tile_sizes(queries: int, keys: int, tile: tuple[int, int], multiple: int = 1) -> tuple[int, int]:
    """Returns the tile sizes of queries and of keys, at most those of `tile`: see `tile_size`."""
    return tile_size(queries, tile[0], multiple), tile_size(keys, tile[1], multiple)


def pad_to_tiles(queries: Queries, kv: KV, tile: tuple[int, int], multiple: int = 1) -> tuple[Queries, KV]:
    """Pads queries and keys whose lengths would give very small tiles, such as prime lengths: see `_tileable`."""
    length, kv_length = queries.query.shape[3], kv.key.shape[2]
    size, kv_size = (_tileable(n, max_size, multiple) for n, max_size in zip((length, kv_length), tile, strict=True))
    if (size, kv_size) == (length, kv_length):
        return queries, kv

    def pad_tokens(x: Tokens, size: int) -> Tokens:
        segments = jnp.zeros_like(x.positions) if x.segments is None else x.segments
        spans = None if x.spans is None else pad(x.spans, 1, size, -1)
        return Tokens(pad(x.positions, 1, size), pad(segments, 1, size, -1), spans, x.runs)

    return (
        Queries(pad(queries.query, 3, size), pad_tokens(queries.tokens, size)),
        KV(pad(kv.key, 2, kv_size), pad(kv.value, 2, kv_size), pad_tokens(kv.tokens, kv_size)),
    )


def pad(x: Array | np.ndarray, dim: int, size: int, value: int = 0) -> Array:
    """Appends `value` along `dim` up to `size`."""
    widths = [(0, size - n if d == dim else 0) for d, n in enumerate(x.shape)]
    return jnp.pad(x, widths, constant_values=value)


def _tileable(length: int, max_size: int, multiple: int) -> int:
    """Returns the length to pad to: `length`, or a greater one if the tiles of `length` are too small.

    Too small is less than a quarter of max_size, or of half the length if that is shorter. Pads to a multiple of
    max_size, or of `multiple` if that is at least the length.
    """
    half = length // 2 if length % 2 == 0 else length
    if tile_size(length, max_size, multiple) * 4 >= min(half, max_size):
        return length
    unit = max_size if length > max_size else multiple
    return -(-length // unit) * unit


def largest_divisor(n: int, max_size: int, multiple: int = 1) -> int:
    """Returns the largest divisor of n that is <= max_size and a multiple of `multiple`; 0 without such a divisor."""
    largest = min(n, max_size) // multiple * multiple
    return next((size for size in range(largest, 0, -multiple) if n % size == 0), 0)
