"""Visibility: which query sees which key, for single tokens (`visible`) and for sets of tokens (`relate`).

Masks are evaluated on positions and ids, never on storage indices, so the same code handles every layout.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

INT32_MAX = int(np.iinfo(np.int32).max)
Ids = Int[Array | np.ndarray, "..."]


@dataclass(frozen=True)
class Mask:
    """A mask on positions. Key j is visible to query i if all fields allow it.

    Attributes:
      causal: p_j <= p_i, or both tokens have the same span (`span_ids` of `ringattn.attention`).
      window: p_i - left <= p_j <= p_i + right. An int, or (left, right): number of earlier and later tokens visible,
        excluding the query's own, as in `local_window_size` of `jax.nn.dot_product_attention`. Mistral's window W is
        (W - 1, 0). A window also restricts spans. None: no window.
      chunk: p_i // chunk == p_j // chunk. Chunks therefore start at absolute positions 0, chunk, 2 * chunk, ... None:
        no chunks.

    Raises ValueError for a window that is not one or two ints >= 0, and for a chunk that is not an int > 0.
    """

    causal: bool = True
    window: int | tuple[int, int] | None = None
    chunk: int | None = None

    def __post_init__(self):
        if self.window is not None:
            sides = np.ravel(self.window).tolist()
            if len(sides) not in (1, 2) or not all(isinstance(side, int) and 0 <= side < INT32_MAX for side in sides):
                raise ValueError(f"window={self.window!r} must be an int from 0 to {INT32_MAX - 1}, or (left, right)")
            # Python ints, because a NumPy array or a list could not be hashed.
            object.__setattr__(self, "window", sides[0] if len(sides) == 1 else tuple(sides))
        if self.chunk is not None:
            if not isinstance(self.chunk, int | np.integer) or not 0 < self.chunk <= INT32_MAX:
                raise ValueError(f"chunk={self.chunk} must be an int from 1 to {INT32_MAX}; use None for no chunks")
            object.__setattr__(self, "chunk", int(self.chunk))

    @property
    def left(self) -> int | None:
        """Number of earlier tokens that the window allows; None: all."""
        return self.window[0] if isinstance(self.window, tuple) else self.window

    @property
    def right(self) -> int | None:
        """Number of later tokens that the window allows; None: all."""
        return self.window[1] if isinstance(self.window, tuple) else self.window


@jax.tree_util.register_static
@dataclass(frozen=True)
class Runs:
    """Positions as far as they are known at trace time: `length` consecutive tokens are `step` positions apart.

    A run starts at every multiple of `length`. The last run may be shorter. Runs are as long as the layout allows: one
    for the tokens of any number of contiguous shards, two for a zigzag shard.

    Attributes:
      length: number of tokens in a run.
      step: difference between the positions of consecutive tokens.
      keys: the shards of the keys relative to those of the queries, if a sequence has as many queries as keys. "local":
        the same shards, or the part of them that starts at index `start`. "remote": as many other shards. "all": all
        shards of the sequence. None: unknown, and for queries.
    """

    length: int
    step: int
    keys: Literal["local", "remote", "all"] | None = None
    start: int = 0

    def part(self, start: int, stop: int) -> "Runs":
        """Returns the runs of tokens `start` to `stop`."""
        within_run = stop <= (start // self.length + 1) * self.length
        length = stop - start if within_run else math.gcd(self.length, start)
        return replace(self, length=length, start=self.start + start)


class Tokens(NamedTuple):
    """Positions, segment ids and span ids of tokens, int32 [rows, L] each; rows is 1 if all rows have the same.

    A negative segment id marks padding. A negative span id means that the token has no span. `runs` is None if the
    positions are given by the user, so that nothing is known of them at trace time.

    Any two positions must differ by less than 2**31, so that their difference does not overflow int32.
    """

    positions: Ids
    segments: Ids | None = None
    spans: Ids | None = None
    runs: Runs | None = None


def visible(mask: Mask, queries: Tokens, keys: Tokens) -> Bool[Array | np.ndarray, "..."]:
    """Returns bool [..., L, M]: True if query i sees key j.

    This is the definition of visibility. `relate` decides it conservatively, from bounds alone.
    """
    q, k = (
        jax.tree.map(lambda x, dim=dim: jnp.expand_dims(x, dim), tokens) for tokens, dim in ((queries, -1), (keys, -2))
    )
    return visible_pairs(mask, q, k)


def visible_pairs(mask: Mask, q: Tokens, k: Tokens) -> Bool[Array | np.ndarray, "..."]:
    """Returns True where the query sees the key. The ids of q and k have any shapes that broadcast."""
    i, j = q.positions, k.positions
    seen = (j <= i) if mask.causal else jnp.ones_like(j <= i)
    if q.spans is not None and k.spans is not None and mask.causal:
        seen |= (q.spans == k.spans) & (q.spans >= 0)
    if mask.left is not None:
        seen &= i - j <= mask.left
    if mask.right is not None:
        seen &= j - i <= mask.right
    if mask.chunk is not None:
        seen &= i - i % mask.chunk == j - j % mask.chunk  # TPU kernels cannot divide and round down
    if q.segments is not None and k.segments is not None:
        seen &= (q.segments == k.segments) & (q.segments >= 0)
    return seen


class IdBounds(NamedTuple):
    """Bounds of the segment ids or span ids of a set of tokens."""

    smallest: Int[Array, "..."]
    """Smallest id >= 0; INT32_MAX if there is none."""
    largest: Int[Array, "..."]
    """Largest id."""
    any_negative: Bool[Array, "..."]
    """True if a token is padding, or has no span."""


class Bounds(NamedTuple):
    """Bounds of a set of tokens: smallest and largest position, and bounds of the ids."""

    first: Int[Array, "..."]
    last: Int[Array, "..."]
    segments: IdBounds | None = None
    spans: IdBounds | None = None


def bounds(tokens: Tokens) -> Bounds:
    """Returns the bounds over the last dim of `tokens`."""

    def id_bounds(ids: Ids | None) -> IdBounds | None:
        if ids is None:
            return None
        return IdBounds(jnp.where(ids < 0, jnp.int32(INT32_MAX), ids).min(-1), jnp.max(ids, -1), jnp.any(ids < 0, -1))

    first, last = jnp.min(tokens.positions, -1), jnp.max(tokens.positions, -1)
    return Bounds(first, last, id_bounds(tokens.segments), id_bounds(tokens.spans))


def relate(mask: Mask, q: Bounds, k: Bounds) -> tuple[Bool[Array, "..."], Bool[Array, "..."]]:
    """Returns (empty, full) for tokens within these bounds.

    `empty` is true only if no query sees any key, `full` only if every query sees every key. Both are false where the
    bounds are inconclusive. The bounds broadcast against each other, so one call compares all tiles of queries with all
    tiles of keys. `full` tiles are computed without a mask, so `full` must take every field of Mask into account.
    """
    empty = (q.first > q.last) | (k.first > k.last)  # False, in the shape to which the bounds broadcast
    full = ~empty
    if mask.causal:
        future, past = k.first > q.last, k.last <= q.first
        if q.spans is not None and k.spans is not None:
            # A span can make future keys visible. Causality already allows all past keys.
            future &= (q.spans.largest < k.spans.smallest) | (k.spans.largest < q.spans.smallest)
        empty, full = empty | future, full & past
    if mask.left is not None:
        empty, full = empty | (q.first - k.last > mask.left), full & (q.last - k.first <= mask.left)
    if mask.right is not None:
        empty, full = empty | (k.first - q.last > mask.right), full & (k.last - q.first <= mask.right)
    if mask.chunk is not None:
        q_low, q_high, k_low, k_high = (x - x % mask.chunk for x in (q.first, q.last, k.first, k.last))
        empty |= (q_low > k_high) | (k_low > q_high)
        full &= (q_low == q_high) & (k_low == k_high) & (q_low == k_low)
    if q.segments is not None and k.segments is not None:
        (q_low, q_high, q_padded), (k_low, k_high, k_padded) = q.segments, k.segments
        empty |= (q_high < k_low) | (k_high < q_low)
        full &= (q_low == q_high) & (k_low == k_high) & (q_low == k_low) & ~q_padded & ~k_padded
    return empty, full
