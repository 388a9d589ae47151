"""Cycles of compiled TPU programs, read from the text that the TPU compiler writes. Needs no TPU.

Two sources, because the compiler does not estimate Pallas kernels:

- Scheduled HLO (`compiled.as_text()`): the compiler's `estimated_cycles` of each op, times the trips of its loops.
- The final schedule of a Pallas kernel (`*-final_bundles.txt` of `--xla_jf_dump_to`): its bundles, instruction words of
  which a core issues one per cycle, times the tiles that the kernel visits.
"""

import re
from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

CYCLE_FLOPS = {
    "TPU v3": 65_536,
    "TPU v4": 262_144,
    "TPU v5 lite": 131_072,
    "TPU v5": 262_144,
    "TPU v6 lite": 524_288,
    "TPU7x": 524_288,
}
"""Dense bfloat16 FLOPs per cycle of a JAX device, by `device_kind`: all of its matrix units, busy in every cycle.

A core of v3 has two units of 128 x 128 multiply-adds, one of v4, v5e and v5p four of them
(`jax/_src/pallas/mosaic/tpu_info.py`), and a device of v4 and v5p two cores. These give the chip's peak FLOP/s
(`hardware.CHIPS`) at a clock of 0.94 GHz (v3), 1.05 (v4), 1.5 (v5e) and 1.75 (v5p). A core of v6e and TPU7x has two
units of 256 x 256. With two products per cycle and multiplier they give the peak FLOP/s at 1.75 and 2.2 GHz; the
compiler's own estimate of a large product, which exceeds one per cycle, agrees.
"""
CORES = {"TPU v4": 2, "TPU v5": 2}
"""TensorCores per JAX device, where it is not 1. Each runs half of a kernel's parallel grid."""
LARGE_SEGMENT = 100
"""Bundles of a conditional segment that is not bookkeeping."""

_BUNDLE = re.compile(r"\s*(?:0x[0-9a-f]+|0)\s+([A-Z]{2})?\s*:\s*(>*)\s*\{(.*)")
_COMPUTATION = re.compile(r"(ENTRY )?%([^ ]+) \(.*\{$")
_OP = re.compile(r"\s+(ROOT )?%([^ ]+) = .*? ([a-z][a-z\d-]*)\((.*)")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_SHAPE = re.compile(r"([a-z]+\d+)\[([\d,]*)\]")


class TileCounts(NamedTuple):
    """Numbers of grid steps and of pairs of tiles in one call of a kernel on one device."""

    steps: float
    full: float
    """Visited pairs without a mask."""
    partial: float
    """Visited pairs with a mask."""
    searched: float = 0.0
    """Empty pairs that the kernel tests and passes over."""
    idle: float = 0.0
    """Grid steps of the forward kernel that visit no tile."""

    @property
    def visited(self) -> float | int:
        return self.full + self.partial


class KernelSchedule(NamedTuple):
    """Bundles of a Pallas kernel."""

    step: int
    """Per grid step, outside of its loop over tiles."""
    full: int
    """Per visited pair of tiles without a mask, with its bookkeeping."""
    partial: int
    """Per visited pair of tiles with a mask, with its bookkeeping."""
    search: int = 0
    """Per empty pair that is passed over."""
    ends: int = 0
    """Per row of tiles, at its begin and end; for kernels whose grid step is one pair of tiles."""
    work: int = 0
    """Per grid step that visits a tile, in addition to `step`."""

    def cycles(self, counts: TileCounts, rows: float | int = 0, cores: int = 1) -> float | int:
        """Returns the cycles of one call. `rows` is the number of rows of tiles; `cores` share the grid evenly."""
        own = self.step * counts.steps + self.work * (counts.steps - counts.idle)
        own += self.search * counts.searched + self.ends * rows
        return (own + self.full * counts.full + self.partial * counts.partial) / cores


class _Segment(NamedTuple):
    """Consecutive bundles without a label or a branch."""

    depth: int
    conditional: bool
    bundles: int


def kernel_schedule(text: str, skips_steps: bool = False) -> KernelSchedule:
    """Returns the bundles of a kernel from the text of its `*-final_bundles.txt`.

    With `skips_steps`, grid steps that visit no tile run no large segment. The first one, which copies the results of
    rows without any visible key, is then not counted.

    In this text the number of '>' is the depth of the loop. Depth 1 is a grid step. A kernel that loops over tiles does
    so at depth 2, and searches for the next tile at depth 3. A conditional segment at least half as long as the longest
    one is a pair of tiles: the first without a mask, the second with one.
    """
    segments = list(_segments(text))
    loops = [segment for segment in segments if segment.depth == 2]
    depth = 2 if sum(segment.bundles for segment in loops) > LARGE_SEGMENT else 1
    large = [s for s in segments if s.depth == depth and s.conditional and s.bundles >= LARGE_SEGMENT]
    longest = max((segment.bundles for segment in large), default=0)
    tiles = [segment for segment in large if 2 * segment.bundles >= longest]
    ends = sum(segment.bundles for segment in large if segment not in tiles) if depth == 1 else 0
    variants = [segment.bundles for segment in tiles]
    own = {n: sum(segment.bundles for segment in segments if segment.depth == n) for n in (1, 2, 3)}
    visit = own[2] - sum(variants) if depth == 2 else 0
    step = own[1] - (sum(variants) + ends if depth == 1 else 0)
    first, last = (variants[0], variants[-1]) if variants else (0, 0)
    skipped = [s.bundles for s in segments if s.depth == 1 and s.bundles >= LARGE_SEGMENT] if skips_steps else [0]
    return KernelSchedule(step - sum(skipped), visit + first, visit + last, own[3], ends, sum(skipped[1:]))


def _segments(text: str) -> Iterator[_Segment]:
    depth, size, conditional, branched = 0, 0, False, False
    for match in map(_BUNDLE.match, text.splitlines()):
        if match is None:
            continue
        label, content = match[1], match[3]
        empty = content.strip().startswith("}")  # such a bundle is printed without its depth
        new_depth = depth if empty else len(match[2])
        if label or branched or new_depth != depth:
            if size:
                yield _Segment(depth, conditional, size)
            size, conditional = 0, branched and not label
        depth, size, branched = new_depth, size + 1, "sbr.rel (" in content
    if size:
        yield _Segment(depth, conditional, size)


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


class _Op(NamedTuple):
    name: str
    kind: str
    rest: str
    is_root: bool

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
      tile_trips: mean trips of the kernel "xla" per tile of queries: of its loop over tiles of keys without a mask, and
        of the following loop over those with one. Their number depends on data.
    """

    def __init__(self, text: str, tile_trips: tuple[float | int, float | int] | None = None):
        """Parses the scheduled HLO of a compiled program."""
        self.computations: dict[str, list[_Op]] = {}
        self.entry, self.tile_trips, ops = "", tile_trips, []
        for line in text.splitlines():
            if header := _COMPUTATION.match(line):
                ops = self.computations[header[2]] = []
                self.entry = header[2] if header[1] else self.entry
            elif op := _OP.match(line):
                ops.append(_Op(op[2], op[3], op[4], op[1] is not None))

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
            if match := _CYCLES.search(op.rest):
                cycles += int(match[1])
            elif op.kind == "while":
                add(self._cost(op.attribute("body") or ""), self.trips(computation, op))
            elif op.kind == "conditional":
                branches = [self._cost(name) for name in _branches(op)]
                add(max(branches, key=lambda cost: cost.cycles), 1)
            elif op.kind == "call" and (called := op.attribute("to_apply")):
                add(self._cost(called), 1)
            elif 'custom_call_target="tpu_custom_call"' in op.rest:
                calls[_kernel_call(op)] += 1
        return Cost(cycles, calls)

    def trips(self, computation: str, op: _Op) -> float | int:
        """Returns the trips of a loop. Raises ValueError if they depend on data and there are no `tile_trips`."""
        limit, start = self._bounds(computation, op)
        if limit is not None:
            return max(limit - (start or 0), 0)
        if any(each.kind == "while" for each in self.computations[op.attribute("body") or ""]):
            return 1.0  # `TilePlan.if_any`
        if self.tile_trips is None:
            raise ValueError(f"the loop %{op.name} has no constant number of trips; give tile_trips")
        traced = [each.name for each in self.computations[computation] if self._is_traced_leaf(computation, each)]
        return self.tile_trips[min(traced.index(op.name), 1)]

    def _is_traced_leaf(self, computation: str, op: _Op) -> bool:
        if op.kind != "while" or self._bounds(computation, op)[0] is not None:
            return False
        return all(each.kind != "while" for each in self.computations[op.attribute("body") or ""])

    def _bounds(self, computation: str, op: _Op) -> tuple[int | None, int | None]:
        """Returns (limit, start) of a loop with the condition index < limit; None where it is not constant."""
        condition = {each.name: each for each in self.computations[op.attribute("condition") or ""]}
        root = next(each for each in condition.values() if each.is_root)
        outer = {each.name: each for each in self.computations[computation]}
        if root.kind != "compare" or "direction=LT" not in root.rest:
            return None, None
        index, limit = (condition[name] for name in root.operands[:2])
        initial = outer[op.operands[0]].operands if op.operands[0] in outer else []

        def value(x: _Op) -> int | None:
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


def _constant(op: _Op) -> int | None:
    number = re.match(r"(-?\d+)\)", op.rest)
    return int(number[1]) if number else None


def _branches(op: _Op) -> list[str]:
    listed = re.search(r"branch_computations=\{([^}]*)\}", op.rest)
    if listed:
        return re.findall(r"%([^\s,]+)", listed[1])
    return re.findall(r"(?:true|false)_computation=%([^\s,]+)", op.rest)


def _kernel_call(op: _Op) -> KernelCall:
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
