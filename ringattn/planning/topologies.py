"""Smaller and larger topologies of the same kind."""

import math
from collections.abc import Iterator
from contextlib import suppress

from ringattn.planning.devices import check_topology
from ringattn.planning.gpus import GPUS

SMALLEST = 8
"""The smallest of the smaller topologies has an 8th of the devices."""


def smaller(topology: str) -> Iterator[str]:
    """Yields the topologies with half of the devices, a quarter and an eighth, as far as they exist.

    Of a TPU topology it halves the longest side. Of GPUs it halves the hosts, or the GPUs of one host.
    """
    devices = math.prod(_sides(topology))
    current: str | None = topology
    while (current := _half(current)) is not None and SMALLEST * math.prod(_sides(current)) >= devices:
        yield current


def _half(topology: str) -> str | None:
    """Returns a topology with half of the devices; None if there is none."""
    name, sides = topology.partition(":")[0], _sides(topology)
    order = range(len(sides)) if name in GPUS else sorted(range(len(sides)), key=lambda axis: -sides[axis])
    for axis in order:
        if sides[axis] % 2 == 0 and (name not in GPUS or len(sides) == 1 or axis == 0):
            halved = [side // 2 if n == axis else side for n, side in enumerate(sides)]
            with suppress(ValueError):
                return _checked(name, halved)
    return None


def double(topology: str) -> str | None:
    """Returns a topology with twice the devices; None if there is none. It doubles the shortest side, or the hosts."""
    name, sides = topology.partition(":")[0], _sides(topology)
    if name in GPUS and len(sides) == 1:
        sides = [1, *sides]
    order = range(1) if name in GPUS else sorted(range(len(sides)), key=lambda axis: (sides[axis], -axis))
    for axis in order:
        with suppress(ValueError):
            return _checked(name, [2 * side if n == axis else side for n, side in enumerate(sides)])
    return None


def _checked(name: str, sides: list[int]) -> str:
    topology = f"{name}:{'x'.join(map(str, sides))}"
    check_topology(topology)
    return topology


def _sides(topology: str) -> list[int]:
    return [int(side) for side in topology.partition(":")[2].split("x")]
