"""Cutting queries and keys into tiles, and visiting just the pairs of tiles in which something is to be seen."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ringattn.attention.kernels import Keys, Queries
from ringattn.attention.mask import Mask, Tokens, extent, relate

TILE = 256, 128
"""Tokens of a tile at most: queries, keys."""
LOGITS = 2**20
"""Logits of a tile at most, over all heads, for which rows of the batch share a trip: the kernel's working memory."""


class Pair(NamedTuple):
    """A tile of queries and one of keys, the same in some rows of the batch, and how to reach them in whole arrays."""

    first_row: Any
    first_query: Any
    first_key: Any
    rows: int
    queries: int
    keys: int

    def q(self, x):
        """The tile [rows, G, R, queries, ...] of x [B, G, R, L, ...]."""
        return self._tile(x, 3, self.first_query, self.queries)

    def k(self, x):
        """The tile [rows, G, keys, ...] of x [B, G, M, ...]."""
        return self._tile(x, 2, self.first_key, self.keys)

    def put_q(self, x, tile):
        """x with that tile of queries replaced."""
        return lax.dynamic_update_slice(x, tile, self._start(x, 3, self.first_query))

    def put_k(self, x, tile):
        """x with that tile of keys replaced."""
        return lax.dynamic_update_slice(x, tile, self._start(x, 2, self.first_key))

    def tokens(self, queries: Queries, keys: Keys) -> tuple[Tokens, Tokens]:
        """The tiles' tokens, [rows or 1, queries] and [rows or 1, keys]."""
        return (
            jax.tree.map(lambda x: self._tile(x, 1, self.first_query, self.queries), queries.tokens),
            jax.tree.map(lambda x: self._tile(x, 1, self.first_key, self.keys), keys.tokens),
        )

    def _tile(self, x, dim, first, size):
        rows = min(x.shape[0], self.rows)  # positions that a layout implies have one row for all
        return lax.dynamic_slice(x, self._start(x, dim, first), (rows, *x.shape[1:dim], size, *x.shape[dim + 1 :]))

    def _start(self, x, dim, first):
        zero = jnp.int32(0)
        row = zero if x.shape[0] == 1 else self.first_row
        return (row, *([zero] * (dim - 1)), first, *([zero] * (x.ndim - dim - 1)))


class Plan(NamedTuple):
    """The pairs of tiles in which some query sees some key: first those without a mask, then those with one."""

    order: Any
    """int32 [pairs]: numbers of all pairs, the ones to visit first."""
    unmasked: Any
    """How many there are in which every query sees every key."""
    seen: Any
    """How many there are to visit."""
    shape: tuple[int, int, int]
    sizes: tuple[int, int, int]
    """Of rows, queries, keys: how many tiles there are, and what a tile holds."""

    def visit(self, trip: Callable[[Pair, Any, bool], Any], carry: Any) -> Any:
        """Folds `trip(pair, carry, masked)` over the pairs; those that need no mask in a loop of their own."""
        rows, queries, keys = self.sizes

        def step(masked: bool, n: Any, carry: Any) -> Any:
            row, i, j = jnp.unravel_index(self.order[n], self.shape)
            return trip(Pair(row * rows, i * queries, j * keys, *self.sizes), carry, masked)

        carry = lax.fori_loop(jnp.zeros_like(self.seen), self.unmasked, lambda n, c: step(False, n, c), carry)
        return lax.fori_loop(self.unmasked, self.seen, lambda n, c: step(True, n, c), carry)

    def if_any(self, f: Callable[[Any], Any], carry: Any) -> Any:
        """f(carry), or carry if there is nothing to visit.

        A loop of at most one turn: to the compiler's scheduler all of f is one operation, which a transfer can only
        span as a whole. Left in pieces, it lets a transfer start before the last piece, which may have nothing to do.
        """
        return lax.fori_loop(jnp.zeros_like(self.seen), jnp.minimum(self.seen, 1), lambda _, c: f(c), carry)


def plan(mask: Mask, queries: Queries, keys: Keys) -> Plan:
    """Judges every pair of tiles by the bounds of its positions, segments and spans."""
    (B, G, R, length, _), keys_length = queries.query.shape, keys.key.shape[2]
    size_q, size_k = (tile_size(n, most) for n, most in zip((length, keys_length), TILE, strict=True))
    rows = _divisor(B, max(LOGITS // (G * R * size_q * size_k), 1))
    shape = B // rows, length // size_q, keys_length // size_k
    judged = relate(mask, _bounds(queries.tokens, size_q, 2), _bounds(keys.tokens, size_k, 1))
    empty, full = (jnp.broadcast_to(x, (B, *shape[1:])).reshape(-1, rows, *shape[1:]).all(1) for x in judged)
    kind = jnp.where(empty, 2, jnp.where(full, 0, 1)).reshape(-1)
    order = jnp.argsort(kind, stable=True).astype(jnp.int32)
    unmasked, seen = (kind == 0).sum(dtype=jnp.int32), (kind < 2).sum(dtype=jnp.int32)
    return Plan(order, unmasked, seen, shape, (rows, size_q, size_k))


def _bounds(tokens: Tokens, size: int, dim: int) -> Any:
    """Extents of all tiles [rows, tiles], with a dim of size 1 at `dim` to compare them along."""
    tiled = jax.tree.map(lambda x: x.reshape(x.shape[0], -1, size), tokens)
    return jax.tree.map(lambda x: jnp.expand_dims(x, dim), extent(tiled))


def tile_size(length: int, most: int) -> int:
    """The greatest divisor up to `most` of half the length, or of all of it if that is odd.

    Half the length, because the two halves of a zigzag shard lie far apart: a tile across them would bound nothing.
    """
    part = length // 2 if length % 2 == 0 else length
    return _divisor(part, most)


def padded(queries: Queries, keys: Keys) -> tuple[Queries, Keys]:
    """Both, lengthened to where tiles are not slivers (a prime length has none); what is added is padding."""
    length, keys_length = queries.query.shape[3], keys.key.shape[2]
    to, keys_to = (_tileable(n, most) for n, most in zip((length, keys_length), TILE, strict=True))
    if (to, keys_to) == (length, keys_length):
        return queries, keys

    def tokens(x: Tokens, to: int) -> Tokens:
        segments = jnp.zeros_like(x.positions) if x.segments is None else x.segments
        spans = None if x.spans is None else pad(x.spans, 1, to, -1)
        return Tokens(pad(x.positions, 1, to), pad(segments, 1, to, -1), spans)

    return (
        Queries(pad(queries.query, 3, to), tokens(queries.tokens, to)),
        Keys(pad(keys.key, 2, keys_to), pad(keys.value, 2, keys_to), tokens(keys.tokens, keys_to)),
    )


def pad(x: Any, dim: int, to: int, value: int = 0) -> Any:
    """x with `value` appended along `dim` up to size `to`."""
    widths = [(0, to - size if d == dim else 0) for d, size in enumerate(x.shape)]
    return jnp.pad(x, widths, constant_values=value)


def _tileable(length: int, most: int) -> int:
    part = length // 2 if length % 2 == 0 else length
    return length if tile_size(length, most) * 4 >= min(part, most) else -(-length // most) * most


def _divisor(of: int, most: int) -> int:
    """The greatest divisor up to `most`."""
    return next(size for size in range(min(of, most), 0, -1) if of % size == 0)
