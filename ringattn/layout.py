"""Layouts: the order in which the tokens of a sequence are distributed over the shards.

`contiguous` keeps the natural order. Under a causal mask, work is unbalanced: shard p-1 attends to p key shards, shard
0 to one. `striped` assigns tokens to the p shards round-robin (Striped Attention, arXiv 2311.09431). `zigzag` cuts the
sequence into 2p pieces and assigns pieces r and 2p-1-r to shard r, so that every shard does the same causal work at
every hop.
"""

import reprlib
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

Layout = Literal["contiguous", "striped", "zigzag"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)


class Piece(NamedTuple):
    """The `count` positions start, start + step, ...; `start` is an int or an array of ints."""

    start: Any
    step: int
    count: int


def check_length(
    length: int,
    layout: str,
    shards: int,
    name: str = "the sequence length",
    shards_name: str = "shards",
    hint: str = "",
) -> None:
    """Raises ValueError, with the nearest valid lengths, unless `layout` divides `length` tokens evenly over `shards`.

    `name` and `shards_name` are used in messages; `hint` is appended to the message about the length.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r} must be one of {', '.join(map(repr, LAYOUTS))}")
    if not isinstance(shards, int | np.integer) or shards < 1:
        raise ValueError(f"{shards_name}={shards!r} must be a positive int, the number of devices of the sequence")
    unit = 2 * shards if layout == "zigzag" else shards
    if length % unit == 0 and length > 0:
        return
    below = length // unit * unit
    fix = f"{below} or {below + unit}" if below > 0 else f"{unit}"
    rule = f"2 * {shards_name} = {unit}" if layout == "zigzag" else f"{shards_name} = {unit}"
    if layout == "zigzag" and length > 0 and length % shards == 0:
        fix += ", or layout='contiguous'"
    raise ValueError(f"{name}={length} must be a positive multiple of {rule} for layout={layout!r}; use {fix}{hint}")


def pieces(layout: str, shard: Any, shards: int, local: int) -> list[Piece]:
    """Returns the pieces of the shard with index `shard`, in storage order.

    `shard` is an int, an array of ints, or a traced index.
    """
    if layout == "contiguous":
        return [Piece(shard * local, 1, local)]
    if layout == "striped":
        return [Piece(shard, shards, local)]
    assert layout == "zigzag", layout  # callers validate layout and length: see check_length
    assert local % 2 == 0, local
    half = local // 2
    return [Piece(shard * half, 1, half), Piece((2 * shards - 1 - shard) * half, 1, half)]


def shard_positions(layout: str, shard: Any, shards: int, local: int) -> Any:
    """Returns positions [local] int32 of the tokens of a shard: NumPy for an int, JAX for a traced index."""
    xp = np if isinstance(shard, int) else jnp
    return xp.concatenate(
        [start + step * np.arange(count, dtype=np.int32) for start, step, count in pieces(layout, shard, shards, local)]
    )


def positions_of(layout: str, first: Any, count: int, shards: int, local: int) -> Any:
    """Returns positions [count * local] int32 of the shards `first` (an int or traced) to `first + count - 1`."""
    indices = first + jnp.arange(count, dtype=jnp.int32)
    return jax.vmap(lambda shard: shard_positions(layout, shard, shards, local))(indices).reshape(-1)


def order(layout: str, length: int, shards: int) -> np.ndarray:
    """Returns positions [length] in storage order: element i of the permuted sequence is token `order[i]`."""
    check_length(length, layout, shards)
    local = length // shards
    return np.concatenate([shard_positions(layout, shard, shards, local) for shard in range(shards)])


def permute(x: Any, layout: str, shards: int, dim: int = 1) -> Any:
    """Permutes the sequence dim of `x` (NumPy or JAX) from natural order to `layout` over `shards` shards.

    Raises ValueError if `x` is not an array, has no such dim, or has a length that does not fit the layout.
    """
    indices = _order_of(x, layout, shards, dim)
    return x.take(indices, axis=dim)


def unpermute(x: Any, layout: str, shards: int, dim: int = 1) -> Any:
    """Restores the natural order: the inverse of `permute`."""
    indices = np.argsort(_order_of(x, layout, shards, dim))
    return x.take(indices, axis=dim)


def _order_of(x: Any, layout: str, shards: int, dim: int) -> np.ndarray:
    if not isinstance(x, np.ndarray | jax.Array):
        fix = "use np.asarray(x), or jax.tree.map for several arrays"
        raise ValueError(f"x={reprlib.repr(x)} must be a NumPy or JAX array; {fix}")
    if not isinstance(dim, int | np.integer) or not -x.ndim <= dim < x.ndim:
        raise ValueError(f"dim={dim!r} must be a dim of x {x.shape}; use the index of the sequence dim, from 0")
    return order(layout, x.shape[dim], shards)
