"""Visibility: which query sees which key, for single tokens (`visible`) and for sets of tokens (`relate`).

Masks are evaluated on positions and ids, never on storage indices, so the same code handles every layout.
"""

from dataclasses import dataclass
from typing import NamedTuple

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


class Tokens(NamedTuple):
    """Positions, segment ids and span ids of tokens, int32 [rows, L] each; rows is 1 if all rows have the same.

    A negative segment id marks padding. A negative span id means that the token has no span.

    Any two positions must differ by less than 2**31, so that their difference does not overflow int32.
    """

    positions: Ids
    segments: Ids | None = None
    spans: Ids | None = None


def visible(mask: Mask, queries: Tokens, keys: Tokens) -> Bool[Array | np.ndarray, "..."]:
    """Returns bool [..., L, M]: True if query i sees key j.

    This is the definition of visibility. `relate` decides it conservatively, from bounds alone.
    """
    i, j = queries.positions[..., :, None], keys.positions[..., None, :]
    seen = (j <= i) if mask.causal else jnp.ones_like(j <= i)
    if queries.spans is not None and keys.spans is not None and mask.causal:
        span = queries.spans[..., :, None]
        seen |= (span == keys.spans[..., None, :]) & (span >= 0)
    if mask.left is not None:
        seen &= i - j <= mask.left
    if mask.right is not None:
        seen &= j - i <= mask.right
    if mask.chunk is not None:
        seen &= i // mask.chunk == j // mask.chunk
    if queries.segments is not None and keys.segments is not None:
        segment = queries.segments[..., :, None]
        seen &= (segment == keys.segments[..., None, :]) & (segment >= 0)
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
    empty, full = q.first > q.last, q.first <= q.last  # False and True, in the shape of the bounds
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
        q_low, q_high, k_low, k_high = (x // mask.chunk for x in (q.first, q.last, k.first, k.last))
        empty |= (q_low > k_high) | (k_low > q_high)
        full &= (q_low == q_high) & (k_low == k_high) & (q_low == k_low)
    if q.segments is not None and k.segments is not None:
        (q_low, q_high, q_padded), (k_low, k_high, k_padded) = q.segments, k.segments
        empty |= (q_high < k_low) | (k_high < q_low)
        full &= (q_low == q_high) & (k_low == k_high) & (q_low == k_low) & ~q_padded & ~k_padded
    return empty, full
