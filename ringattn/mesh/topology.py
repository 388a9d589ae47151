"""Device order in a mesh: on TPUs each ring is a Hamiltonian cycle over ICI neighbors."""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any

import jax
import numpy as np

from ringattn.mesh.axes import CONTEXT


def arrange_devices(sizes: Mapping[str, int], devices: Sequence[Any]) -> jax.sharding.Mesh:
    """Returns a mesh with explicit axes of `sizes`; on TPUs each ring is a Hamiltonian cycle over ICI neighbors.

    `devices` may be compile-only (`jax.experimental.topologies`). If they fill a box of chips, each ring is assigned a
    sub-box, one with a Hamiltonian cycle if possible. Between chips that are not neighbors the compiler does not
    overlap the send with compute.
    """
    explicit = (jax.sharding.AxisType.Explicit,) * len(sizes)
    if devices[0].platform != "tpu":
        return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=explicit, devices=devices)
    array = np.empty(len(devices), object)
    array[:] = list(devices)
    order = ring_boxes(sizes, [(*device.coords, device.core_on_chip) for device in devices])
    array = array.reshape(tuple(sizes.values())) if order is None else array[order]
    return jax.sharding.Mesh(array, tuple(sizes), axis_types=explicit)


def ring_boxes(sizes: Mapping[str, int], coords: Sequence[Sequence[int]]) -> np.ndarray | None:
    """Returns indices into `coords` in the shape of `sizes`, each ring in a sub-box; None if `coords` fill no box."""
    sides = [sorted(set(side)) for side in zip(*coords, strict=True)]
    cells = {tuple(coord): index for index, coord in enumerate(coords)}
    box = tuple(map(len, sides))
    if len(cells) < len(coords) or math.prod(box) != len(coords):
        return None
    grid = np.array([cells[cell] for cell in product(*sides)]).reshape(box)
    context = list(sizes).index(CONTEXT)
    others = [n for n in range(len(sizes)) if n != context]

    def cost(split: Sequence[tuple[int, ...]]) -> tuple[bool, int]:
        """Returns (rings have no Hamiltonian cycle, number of sides factored over both the ring and another axis)."""
        strided = [min(pair) > 1 for n in others for pair in zip(split[n], split[context], strict=True)]
        return closed_walk(split[context]) is None, sum(strided)

    split = min(_splits(tuple(sizes.values()), box), key=cost, default=None)
    if split is None:
        return None
    # Each side of the box is factored over the axes. The ring's factor is innermost, so that its chips are adjacent.
    axis_order = [*others, context]
    factored = grid.reshape([split[n][k] for k in range(len(box)) for n in axis_order])
    dims = [k * len(axis_order) + axis_order.index(n) for n in range(len(sizes)) for k in range(len(box))]
    indices = factored.transpose(dims).reshape(tuple(sizes.values()))
    walk = closed_walk(split[context])
    return indices if walk is None else indices.take(walk, axis=context)


def _splits(sizes: tuple[int, ...], box: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], ...]]:
    """Yields all ways to factor the box's sides over the axes: the factors of an axis multiply to its size."""
    if not sizes:
        yield from [()] if math.prod(box) == 1 else []
        return
    for factors in product(*([n for n in range(1, side + 1) if side % n == 0] for side in box)):
        if math.prod(factors) == sizes[0]:
            quotient = tuple(side // n for side, n in zip(box, factors, strict=True))
            yield from ((factors, *others) for others in _splits(sizes[1:], quotient))


def closed_walk(box: tuple[int, ...]) -> list[int] | None:
    """Returns a Hamiltonian cycle over the cells of a box, as indices in C order.

    Consecutive cells are adjacent, and so are the last and the first. Returns None if no cycle exists: for an odd
    number of cells, or a single row of more than two. One or two cells keep their order.
    """
    size = math.prod(box)
    if size <= 2:
        return list(range(size))
    across = [n for n, side in enumerate(box) if side > 1 and size // side % 2 == 0]
    if not across:
        return None
    n = across[0]
    rows = _snake_order(box[:n] + box[n + 1 :])
    # Visit all rows except their first cells in snake order, then return through the first cells.
    forward = [(*row[:n], x, *row[n:]) for i, row in enumerate(rows) for x in range(1, box[n])[:: 1 - 2 * (i % 2)]]
    back = [(*row[:n], 0, *row[n:]) for row in reversed(rows)]
    return [int(np.ravel_multi_index(cell, box)) for cell in forward + back]


def _snake_order(box: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Returns all cells of a box in snake order: consecutive cells are adjacent."""
    if not box:
        return [()]
    inner = _snake_order(box[1:])
    return [(x, *rest) for x in range(box[0]) for rest in inner[:: 1 - 2 * (x % 2)]]
