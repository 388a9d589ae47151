"""Which query may see which key: asked of single tokens, of ranges of tokens, and of whole hops of the ring.

Every token carries its position, its segment and its span, so a mask is a function of two tokens, and one loop
serves every layout: a layout is only an order in which tokens lie.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from ringattn.layout import pieces

NO_ID = int(np.iinfo(np.int32).max)


@dataclass(frozen=True)
class Mask:
    """Which positions a query sees: p_j <= p_i if `causal`, p_i - left <= p_j <= p_i + right, same chunk.

    Attributes:
      causal: no key after the query.
      window: None, (left, right), or one int for both, counted in tokens to each side of the query's own (as
        `local_window_size` of `jax.nn.dot_product_attention`).
      chunk: only keys of the same floor(position / chunk).

    Raises ValueError on a negative window or a chunk that is not positive.
    """

    causal: bool = True
    window: int | tuple[int, int] | None = None
    chunk: int | None = None

    def __post_init__(self):
        sides = () if self.window is None else np.ravel(self.window).tolist()
        if len(sides) > 2 or not all(isinstance(side, int) and 0 <= side < NO_ID for side in sides):
            raise ValueError(f"window={self.window} must be an int from 0 to {NO_ID - 1}, or two, (left, right)")
        if sides:  # plain ints, whatever kind was given: a mask is hashed
            object.__setattr__(self, "window", sides[0] if len(sides) == 1 else tuple(sides))
        if self.chunk is not None and not 0 < self.chunk <= NO_ID:
            raise ValueError(f"chunk={self.chunk} must be from 1 to {NO_ID}; None for no chunks")

    @property
    def left(self) -> int | None:
        """Tokens a query sees before its own; None: all."""
        return self.window[0] if isinstance(self.window, tuple) else self.window

    @property
    def right(self) -> int | None:
        """Tokens a query sees after its own, causality aside; None: all."""
        return self.window[1] if isinstance(self.window, tuple) else self.window


class Tokens(NamedTuple):
    """What a mask asks of tokens: int32 [rows or 1, L] each. Negative segments are padding, negative spans none.

    Positions lie within 2**31 of each other, so that their differences are int32, too.
    """

    positions: Any
    segments: Any = None
    spans: Any = None


def visible(mask: Mask, queries: Tokens, keys: Tokens) -> Any:
    """bool [..., L, M]: may query i see key j? The definition that everything else here only bounds."""
    i, j = queries.positions[..., :, None], keys.positions[..., None, :]
    seen = (j <= i) if mask.causal else jnp.ones_like(j <= i)
    if queries.spans is not None and mask.causal:
        span = queries.spans[..., :, None]
        seen |= (span == keys.spans[..., None, :]) & (span >= 0)
    if mask.left is not None:
        seen &= i - j <= mask.left
    if mask.right is not None:
        seen &= j - i <= mask.right
    if mask.chunk is not None:
        seen &= i // mask.chunk == j // mask.chunk
    if queries.segments is not None:
        segment = queries.segments[..., :, None]
        seen &= (segment == keys.segments[..., None, :]) & (segment >= 0)
    return seen


class Extent(NamedTuple):
    """Bounds of a set of tokens: positions [first, last]; of each id >= 0 the least and greatest; any without?"""

    first: Any
    last: Any
    segments: tuple[Any, Any, Any] | None = None
    spans: tuple[Any, Any, Any] | None = None


def extent(tokens: Tokens) -> Extent:
    """Bounds over the last dim of `tokens`."""

    def ids(x):
        if x is None:
            return None
        return jnp.where(x < 0, jnp.int32(NO_ID), x).min(-1), x.max(-1), (x < 0).any(-1)

    positions = tokens.positions
    return Extent(positions.min(-1), positions.max(-1), ids(tokens.segments), ids(tokens.spans))


def relate(mask: Mask, q: Extent, k: Extent) -> tuple[Any, Any]:
    """(empty, full) for tokens within these bounds: surely no query sees any key; surely every one sees all.

    The bounds broadcast against each other, so one call compares all tiles of queries with all tiles of keys.
    """
    empty, full = q.first > q.last, q.first <= q.last
    if mask.causal:
        future, past = k.first > q.last, k.last <= q.first
        if q.spans is not None and k.spans is not None:
            future &= (q.spans[1] < k.spans[0]) | (k.spans[1] < q.spans[0])
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


@lru_cache
def needed_hops(mask: Mask, layout: str, shards: int, queries: int, keys: int, group: int = 1) -> frozenset[int]:
    """The h > 0 for which some member r of a ring sees a key of member r - h, positions as `layout` implies.

    The sequence lies over `shards` shards of `keys` tokens, the last of them also over as many shards of `queries`; a
    member of the ring holds `group` shards in a row. Exact but for `chunk`, judged by a piece's first and last token.
    """
    members = np.arange(shards).reshape(-1, group)

    def held(members, local, ahead=0):
        found = (piece for column in members.T for piece in pieces(layout, column, shards, local))
        return [piece._replace(start=piece.start + ahead) for piece in found]

    of_queries, needed = held(members, queries, shards * (keys - queries)), set()
    for hop in range(1, len(members)):
        of_keys = held(np.roll(members, hop, axis=0), keys)
        if any(_meet(mask, q, k).any() for q in of_queries for k in of_keys):
            needed.add(hop)
    return frozenset(needed)


def _meet(mask: Mask, q, k) -> np.ndarray:
    """bool [members]: does a query of piece q see a key of piece k (pieces of one step)?"""
    # p_i - p_j runs over start + step * m, -behind <= step * m <= ahead; is one within the mask's bounds [low, high]?
    start, step, behind, ahead = q.start - k.start, q.step, q.step * (k.count - 1), q.step * (q.count - 1)
    low = np.maximum(start - behind, 0 if mask.causal else start - behind)
    low = low if mask.right is None else np.maximum(low, -mask.right)
    high = start + ahead if mask.left is None else np.minimum(start + ahead, mask.left)
    met = start + -(-(low - start) // step) * step <= high
    if mask.chunk is not None:
        met &= (q.start // mask.chunk <= (k.start + behind) // mask.chunk) & (
            k.start // mask.chunk <= (q.start + ahead) // mask.chunk
        )
    return met
