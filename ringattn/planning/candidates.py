"""Candidates of a ranking: strategy, layout, mesh and rematerialization of a train step."""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple, get_args

from ringattn import config
from ringattn.config.choices import Layout
from ringattn.config.stages import with_values
from ringattn.cost.flops import RECOMPUTED
from ringattn.mesh.axes import AXES, describe_sizes
from ringattn.mesh.devices import resolve
from ringattn.planning.estimate import Machine

MAX_TENSOR = 8
"""Largest tensor axis tried: its all-reduces must stay within a host of GPUs."""
STRATEGIES = ("ring", "gather", "ulysses", "usp")
RUNGS = tuple(RECOMPUTED)
"""The values of `model.remat`, from the one with the least recomputation and the most memory on the device."""


class Open(NamedTuple):
    """The values in which candidates differ."""

    strategy: bool
    mesh: bool
    remat: bool

    @classmethod
    def of(cls, c: config.Config) -> "Open":
        """Returns the values that `c` leaves to the planner."""
        return cls(c.attention.strategy == "auto", c.mesh.auto, c.model.remat == "auto")

    def __str__(self) -> str:
        options = ("attention.strategy=auto", "mesh.auto=True", "model.remat=auto")
        return " ".join(option for option, is_open in zip(options, self, strict=True) if is_open)


class Candidate(NamedTuple):
    """Values of a train step."""

    sizes: tuple[int, ...]
    """Sizes of the mesh axes, in the order of `AXES`."""
    strategy: str
    layout: str
    remat: str

    @property
    def mesh(self) -> dict[str, int]:
        return dict(zip(AXES, self.sizes, strict=True))

    @property
    def group(self) -> tuple[object, ...]:
        """All values but the rematerialization."""
        return self.sizes, self.strategy, self.layout

    @property
    def kind(self) -> tuple[str, str]:
        """Name of the strategy, and rematerialization."""
        return self.name, self.remat

    def apply(self, c: config.Config) -> config.Config:
        """Returns `c` with the values of the candidate."""
        values = {"attention.strategy": self.strategy, "attention.layout": self.layout, "model.remat": self.remat}
        return with_values(replace(c, mesh=replace(c.mesh, auto=False, **self.mesh)), values)

    def __str__(self) -> str:
        return f"{self.name} {self.layout} on {describe_sizes(self.mesh)}, remat {self.remat}"

    @property
    def name(self) -> str:
        """Name of the strategy in reports."""
        return strategy_name(self.strategy, self.mesh)


def strategy_name(strategy: str, mesh: dict[str, int]) -> str:
    """Returns the name of a strategy in reports: 'nested ring' for a ring over two axes."""
    _, outer, inner, _ = mesh.values()
    return "nested ring" if strategy == "ring" and min(outer, inner) > 1 else strategy


def candidates(c: config.Config, machine: Machine, dimensions: Open, layouts: bool) -> Iterator[Candidate]:
    """Yields the candidates of `c`. Some may not divide over the devices. With `layouts`, also those of other layouts.

    Equivalent candidates occur once: without a sharded sequence all strategies are a ring of one device, and usp over
    one device of an axis is ulysses or a ring. A nested ring is tried with one split of the sequence only.
    """
    meshes = list(_meshes(machine)) if dimensions.mesh else [tuple(resolve(c.mesh, machine.devices).values())]
    strategies = STRATEGIES if dimensions.strategy else (c.attention.strategy,)
    names = (c.attention.layout, *(each for each in get_args(Layout) if layouts and each != c.attention.layout))
    rungs = RUNGS if dimensions.remat else (c.model.remat,)
    for sizes in meshes:
        sharded = math.prod(sizes[1:3]) > 1
        for strategy in strategies:
            if any(dimensions[:2]) and not _is_sensible(strategy, sizes, machine, dimensions):
                continue
            for layout in names if sharded else names[:1]:
                yield from (Candidate(sizes, strategy, layout, rung) for rung in rungs)


def _is_sensible(strategy: str, sizes: tuple[int, ...], machine: Machine, dimensions: Open) -> bool:
    _, outer, inner, tensor = sizes
    if outer * inner == 1:
        return strategy == "ring" or not dimensions.strategy
    if min(outer, inner) == 1:
        return strategy != "usp" and (not dimensions.mesh or outer == 1)
    if not dimensions.mesh or strategy == "usp":
        return True
    return strategy == "ring" and inner == _nested(outer * inner, tensor, machine)


def _nested(members: int, tensor: int, machine: Machine) -> int:
    """Returns the inner axis of a nested ring of `members`: a host of GPUs, or the inner of two nearly equal axes."""
    host = machine.devices_per_host // tensor
    if 1 < host < members and members % host == 0:
        return host
    return min(each for each in _divisors(members) if each * each >= members)


def _meshes(machine: Machine) -> Iterator[tuple[int, ...]]:
    """Yields the sizes of the axes that multiply to the number of devices."""
    count = machine.devices
    for tensor in (each for each in _divisors(count) if each <= MAX_TENSOR and machine.devices_per_host % each == 0):
        for data in _divisors(count // tensor):
            members = count // tensor // data
            yield from ((data, members // inner, inner, tensor) for inner in _divisors(members))


def _divisors(number: int) -> list[int]:
    return [each for each in range(1, number + 1) if number % each == 0]
