"""Splits queries and keys into tiles, and visits only the pairs of tiles in which some query sees some key."""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int

from ringattn.attn.kernels.protocol import KV, Queries
from ringattn.attn.mask import Bounds, Mask, Tokens, bounds, relate

State = TypeVar("State")
"""Pytree that a loop over pairs of tiles updates."""

TILE = 256, 128
"""Maximum number of queries and of keys in a tile."""
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
    """An ordering of all tile pairs: unmasked, masked, empty."""

    order: Int[Array, " pairs"]
    """Flat indices of all pairs, in the order of visits."""
    unmasked: Int[Array, ""]
    """Number of pairs in which every query sees every key, so no mask is computed."""
    visited: Int[Array, ""]
    """Number of unmasked and masked pairs. The empty pairs are skipped."""
    counts: tuple[int, int, int]
    """Number of tiles along the batch, the queries and the keys."""
    sizes: tuple[int, int, int]
    """Size of a tile: rows, queries, keys."""

    def visit(self, step: Callable[[TilePair, State, bool], State], state: State) -> State:
        """Folds `step(pair, state, masked)` over the pairs, in one loop without a mask and one with it."""
        rows, queries, keys = self.sizes

        def visit_one(masked: bool, n: Int[Array, ""], state: State) -> State:
            row, i, j = jnp.unravel_index(self.order[n], self.counts)
            return step(TilePair(row * rows, i * queries, j * keys, *self.sizes), state, masked)

        state = lax.fori_loop(jnp.zeros_like(self.visited), self.unmasked, lambda n, s: visit_one(False, n, s), state)
        return lax.fori_loop(self.unmasked, self.visited, lambda n, s: visit_one(True, n, s), state)

    def if_any(self, f: Callable[[State], State], state: State) -> State:
        """Returns f(state), or state if no pair is visited.

        Wrapping f in a loop makes it one operation for XLA's scheduler. Otherwise the scheduler may place the start of
        a transfer just before the last small operation of f, leaving it exposed.
        """
        return lax.fori_loop(jnp.zeros_like(self.visited), jnp.minimum(self.visited, 1), lambda _, s: f(s), state)


def plan_tiles(mask: Mask, queries: Queries, kv: KV) -> TilePlan:
    """Orders all tile pairs by the bounds of their positions, segments and spans."""
    (B, G, R, length, _), kv_length = queries.query.shape, kv.key.shape[2]
    q_size, kv_size = (tile_size(n, max_size) for n, max_size in zip((length, kv_length), TILE, strict=True))
    rows = _largest_divisor(B, max(MAX_LOGITS // (G * R * q_size * kv_size), 1))
    counts = B // rows, length // q_size, kv_length // kv_size
    related = relate(mask, _tile_bounds(queries.tokens, q_size, 2), _tile_bounds(kv.tokens, kv_size, 1))
    empty, full = (jnp.broadcast_to(x, (B, *counts[1:])).reshape(-1, rows, *counts[1:]).all(1) for x in related)
    kind = jnp.where(empty, 2, jnp.where(full, 0, 1)).reshape(-1)
    order = jnp.argsort(kind, stable=True).astype(jnp.int32)
    unmasked, visited = (kind == 0).sum(dtype=jnp.int32), (kind < 2).sum(dtype=jnp.int32)
    return TilePlan(order, unmasked, visited, counts, (rows, q_size, kv_size))


def _tile_bounds(tokens: Tokens, size: int, dim: int) -> Bounds:
    """Returns the bounds of all tiles: [rows, q_tiles, 1] for dim=2, [rows, 1, kv_tiles] for dim=1."""
    tiled = jax.tree.map(lambda x: x.reshape(x.shape[0], -1, size), tokens)
    return jax.tree.map(lambda x: jnp.expand_dims(x, dim), bounds(tiled))


def tile_size(length: int, max_size: int) -> int:
    """Returns the tile size: the largest divisor <= max_size of length / 2, or of length if it is odd.

    Tiles do not cross the middle of a shard. The two halves of a zigzag shard are far apart in the sequence, so the
    position bounds of a tile with tokens of both halves would be too wide to skip any pair.
    """
    half = length // 2 if length % 2 == 0 else length
    return _largest_divisor(half, max_size)


def pad_to_tiles(queries: Queries, kv: KV) -> tuple[Queries, KV]:
    """Pads queries and keys whose lengths would give very small tiles, such as prime lengths: see `_tileable`."""
    length, kv_length = queries.query.shape[3], kv.key.shape[2]
    size, kv_size = (_tileable(n, max_size) for n, max_size in zip((length, kv_length), TILE, strict=True))
    if (size, kv_size) == (length, kv_length):
        return queries, kv

    def pad_tokens(x: Tokens, size: int) -> Tokens:
        segments = jnp.zeros_like(x.positions) if x.segments is None else x.segments
        spans = None if x.spans is None else pad(x.spans, 1, size, -1)
        return Tokens(pad(x.positions, 1, size), pad(segments, 1, size, -1), spans)

    return (
        Queries(pad(queries.query, 3, size), pad_tokens(queries.tokens, size)),
        KV(pad(kv.key, 2, kv_size), pad(kv.value, 2, kv_size), pad_tokens(kv.tokens, kv_size)),
    )


def pad(x: Array | np.ndarray, dim: int, size: int, value: int = 0) -> Array:
    """Appends `value` along `dim` up to `size`."""
    widths = [(0, size - n if d == dim else 0) for d, n in enumerate(x.shape)]
    return jnp.pad(x, widths, constant_values=value)


def _tileable(length: int, max_size: int) -> int:
    """Returns the length to pad to: `length`, or the next multiple of max_size if the tiles of `length` are too small.

    Too small is less than a quarter of max_size, or of half the length if that is shorter.
    """
    half = length // 2 if length % 2 == 0 else length
    return length if tile_size(length, max_size) * 4 >= min(half, max_size) else -(-length // max_size) * max_size


def _largest_divisor(n: int, max_size: int) -> int:
    """Returns the largest divisor of n that is <= max_size."""
    return next(size for size in range(min(n, max_size), 0, -1) if n % size == 0)
