"""The order in which a sequence's tokens lie over the shards of a ring.

`contiguous` keeps the order. Causal work is then uneven: the last shard's queries see every key, the first
shard's almost none. `striped` deals the tokens out like cards (Striped Attention, arXiv 2311.09431), `zigzag`
gives shard r the pieces r and 2p-1-r of 2p, so that every shard does the same causal work at every hop.
"""

from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

Layout = Literal["contiguous", "striped", "zigzag"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)


class Piece(NamedTuple):
    """Tokens whose positions are start, start + step, ..., `count` of them; start is an int or an array of them."""

    start: Any
    step: int
    count: int


def check_length(length: int, layout: str, shards: int, name: str = "the sequence length") -> None:
    """Raises ValueError, naming the nearest lengths that fit, if `length` tokens cannot lie in `layout`."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r} is none of {', '.join(map(repr, LAYOUTS))}")
    unit = 2 * shards if layout == "zigzag" else shards
    if length % unit == 0 and length > 0:
        return
    below = length // unit * unit
    fitting = f"{below} or {below + unit}" if below > 0 else f"{unit}"
    rule = f"2 * context = {unit}" if layout == "zigzag" else f"context = {unit}"
    other = ", or layout='contiguous'" if layout == "zigzag" and length > 0 and length % shards == 0 else ""
    raise ValueError(
        f"{name}={length} must be a positive multiple of {rule} for layout={layout!r}: use {fitting}{other}"
    )


def pieces(layout: str, shard: Any, shards: int, local: int) -> list[Piece]:
    """What shard number `shard` (an int, an array of ints, or a traced index) of `shards` holds, in order."""
    if layout == "contiguous":
        return [Piece(shard * local, 1, local)]
    if layout == "striped":
        return [Piece(shard, shards, local)]
    assert layout == "zigzag", layout  # check_length has seen to it
    half = local // 2
    return [Piece(shard * half, 1, half), Piece((2 * shards - 1 - shard) * half, 1, half)]


def shard_positions(layout: str, shard: Any, shards: int, local: int) -> Any:
    """Positions [local] int32 of the tokens of shard number `shard`: NumPy for an int, JAX for a traced index."""
    xp = np if isinstance(shard, int) else jnp
    held = pieces(layout, shard, shards, local)
    return xp.concatenate([piece.start + piece.step * np.arange(piece.count, dtype=np.int32) for piece in held])


def positions_of(layout: str, first: Any, count: int, shards: int, local: int) -> Any:
    """Positions [count * local] int32 of the tokens of `count` shards from number `first` (traced, or an int) on."""
    numbers = first + jnp.arange(count, dtype=jnp.int32)
    return jax.vmap(lambda shard: shard_positions(layout, shard, shards, local))(numbers).reshape(-1)


def order(layout: str, length: int, shards: int) -> np.ndarray:
    """Positions [length] in the order in which the tokens lie: token `order[i]` lies at place i."""
    check_length(length, layout, shards)
    local = length // shards
    return np.concatenate([shard_positions(layout, shard, shards, local) for shard in range(shards)])


def permute(x: Any, layout: str, shards: int, dim: int = 1) -> Any:
    """Puts the sequence dim of `x` (a NumPy or JAX array in natural order) into `layout` over `shards` shards.

    Raises ValueError if the length does not fit the layout.
    """
    return x.take(order(layout, x.shape[dim], shards), axis=dim)


def unpermute(x: Any, layout: str, shards: int, dim: int = 1) -> Any:
    """The inverse of `permute`: natural order again."""
    return x.take(np.argsort(order(layout, x.shape[dim], shards)), axis=dim)
