"""The scheduled HLO of a compiled program: its computations, the trips of its loops, and the compiler's cycles."""

import re
from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

_COMPUTATION = re.compile(r"(ENTRY )?%([^ ]+) \(.*\{$")
_OP = re.compile(r"\s+(ROOT )?%([^ ]+) = (.*?) ([a-z][a-z\d-]*)\((.*)")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_SHAPE = re.compile(r"([a-z]+\d+)\[([\d,]*)\]")


class KernelCall(NamedTuple):
    """A call of an attention kernel in a program: its name without number, queries and keys per row."""

    name: str
    queries: int
    keys: int


class Cost(NamedTuple):
    """Estimated cycles of XLA's ops, and the numbers of calls of Pallas kernels, which are not in these cycles."""

    cycles: float
    calls: Counter[KernelCall]


class Loop(NamedTuple):
    """A loop of a program: its trips, how often it runs, and the cost of one trip."""

    trips: float
    runs: float
    body: Cost


class TileTrips(NamedTuple):
    """Mean trips of the kernel "xla" per tile of queries, which depend on data."""

    full: float
    """Trips of the loop over tiles of keys without a mask."""
    partial: float
    """Trips of the following loop, over tiles with a mask."""
    keys: int
    """Number of keys of the call. A call with fewer keys has proportionally fewer trips."""


class Op(NamedTuple):
    """An op of scheduled HLO: `%name = shape kind(rest`."""

    name: str
    shape: str
    kind: str
    rest: str
    is_root: bool

    @property
    def cycles(self) -> int | None:
        """The compiler's estimate; None if the op has none."""
        match = _CYCLES.search(self.rest)
        return int(match[1]) if match else None

    def attribute(self, key: str) -> str | None:
        match = re.search(rf"\b{key}=%([^\s,)}}]+)", self.rest)
        return match[1] if match else None

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([^\s,()]+)", self.rest[: self.rest.find(")")])


class Program:
    """A compiled program.

    Attributes:
      computations: the ops of each computation, by name.
      entry: name of the computation that runs first.
      tile_trips: trips of the kernel "xla"; None if the program does not contain it.
    """

    def __init__(self, text: str, tile_trips: TileTrips | None = None):
        """Parses the scheduled HLO of a compiled program."""
        self.computations: dict[str, list[Op]] = {}
        self.entry, self.tile_trips, ops = "", tile_trips, []
        for line in text.splitlines():
            if header := _COMPUTATION.match(line):
                ops = self.computations[header[2]] = []
                self.entry = header[2] if header[1] else self.entry
            elif op := _OP.match(line):
                ops.append(Op(op[2], op[3], op[4], op[5], op[1] is not None))

    def calls_of(self, computation: str, op: Op) -> list[tuple[str, float | int]]:
        """Returns the computations that a loop, a conditional or a call runs, and how often; a loop its body.

        Of the branches of a conditional, it returns the one with the most cycles. Fusions are single ops.
        """
        if op.kind == "while":
            return [(op.attribute("body") or "", self.trips(computation, op))]
        if op.kind == "conditional":
            return [(max(_branches(op), key=lambda name: self._cost(name).cycles), 1)]
        if op.kind == "call" and (called := op.attribute("to_apply")):
            return [(called, 1)]
        return []

    @cached_property
    def cost(self) -> Cost:
        """The cost of running the program once."""
        return self._cost(self.entry)

    def loops(self, computation: str = "", runs: float | int = 1) -> Iterator[Loop]:
        """Yields all loops, outer ones first."""
        for op in self.computations[computation or self.entry]:
            if op.kind == "while":
                body, trips = op.attribute("body") or "", self.trips(computation or self.entry, op)
                yield Loop(trips, runs, self._cost(body))
                yield from self.loops(body, runs * trips)

    def _cost(self, computation: str) -> Cost:
        cycles, calls = 0.0, Counter[KernelCall]()

        def add(cost: Cost, times: float | int) -> None:
            nonlocal cycles
            cycles += times * cost.cycles
            for call, count in cost.calls.items():
                calls[call] += times * count  # type: ignore[assignment]

        for op in self.computations[computation]:
            if (own := op.cycles) is not None:
                cycles += own
            elif called := self.calls_of(computation, op):
                for name, times in called:
                    add(self._cost(name), times)
            elif 'custom_call_target="tpu_custom_call"' in op.rest:
                calls[kernel_call(op)] += 1
        return Cost(cycles, calls)

    def trips(self, computation: str, op: Op) -> float | int:
        """Returns the trips of a loop. Raises ValueError if they depend on data and there are no `tile_trips`."""
        if known := _TRIPS.search(op.rest):  # GPU and CPU compilers
            return int(known[1])
        limit, start = self._bounds(computation, op)
        if limit is not None:
            return max(limit - (start or 0), 0)
        if any(each.kind == "while" for each in self.computations[op.attribute("body") or ""]):
            return 1.0  # `TilePlan.if_any`
        if self.tile_trips is None:
            raise ValueError(f"the loop %{op.name} has no constant number of trips; give tile_trips")
        traced = [each.name for each in self.computations[computation] if self._is_traced_leaf(computation, each)]
        trips = self.tile_trips[min(traced.index(op.name), 1)]
        return trips * _keys(op, self.tile_trips.keys) / self.tile_trips.keys

    def _is_traced_leaf(self, computation: str, op: Op) -> bool:
        if op.kind != "while" or self._bounds(computation, op)[0] is not None:
            return False
        return all(each.kind != "while" for each in self.computations[op.attribute("body") or ""])

    def _bounds(self, computation: str, op: Op) -> tuple[int | None, int | None]:
        """Returns (limit, start) of a loop with the condition index < limit; None where it is not constant."""
        condition = {each.name: each for each in self.computations[op.attribute("condition") or ""]}
        root = next(each for each in condition.values() if each.is_root)
        outer = {each.name: each for each in self.computations[computation]}
        if root.kind != "compare" or "direction=LT" not in root.rest:
            return None, None
        index, limit = (condition[name] for name in root.operands[:2])
        initial = outer[op.operands[0]].operands if op.operands[0] in outer else []

        def value(x: Op) -> int | None:
            if x.kind == "constant":
                return _constant(x)
            place = re.search(r"index=(\d+)", x.rest)
            if x.kind != "get-tuple-element" or place is None or int(place[1]) >= len(initial):
                return None
            source = outer.get(initial[int(place[1])])
            while source is not None and source.kind in ("copy", "bitcast"):
                source = outer.get(source.operands[0])
            return _constant(source) if source is not None and source.kind == "constant" else None

        return value(limit), value(index)


def _keys(op: Op, default: int) -> int:
    """Returns M of the key [B, G, M, D] that a loop of the kernel "xla" carries beside the query [B, G, R, L, D].

    Returns `default` if it carries no query.
    """
    carried = [[int(n) for n in dims.split(",") if n] for _, dims in _SHAPE.findall(op.shape)]
    query = next((dims for dims in carried if len(dims) == 5), None)
    if query is None:
        return default
    B, G, R, L, D = query
    keys = (dims[2] for dims in carried if [*dims[:2], *dims[3:]] == [B, G, D] and dims != [B, G, R, L])
    return next(keys, default)


def _constant(op: Op) -> int | None:
    number = re.match(r"(-?\d+)\)", op.rest)
    return int(number[1]) if number else None


def _branches(op: Op) -> list[str]:
    """Returns the computations of a conditional."""
    listed = re.search(r"branch_computations=\{([^}]*)\}", op.rest)
    if listed:
        return re.findall(r"%([^\s,]+)", listed[1])
    return re.findall(r"(?:true|false)_computation=%([^\s,]+)", op.rest)


def kernel_call(op: Op) -> KernelCall:
    """Reads the lengths of query [B, ., R, L, D] and key [B, ., M, D], the first of their rank, dtype and last dim."""
    base = re.sub(r"(\.\d+|\.clone)*$", "", op.name)
    _, _, layouts = op.rest.partition("operand_layout_constraints=")
    shapes = [(dtype, [int(n) for n in dims.split(",") if n]) for dtype, dims in _SHAPE.findall(layouts)]
    query = next(((dtype, dims) for dtype, dims in shapes if len(dims) == 5), None)
    if query is None:
        return KernelCall(base, 0, 0)
    dtype, (batch, _, _, queries, width) = query
    keys = (d[2] for kind, d in shapes if kind == dtype and len(d) == 4 and d[0] == batch and d[3] == width)
    return KernelCall(base, queries, next(keys, 0))
