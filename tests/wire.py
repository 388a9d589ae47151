"""What a program sends from device to device, read from its jaxpr or from compiled HLO."""

import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr

COLLECTIVES = {"ppermute", "all_gather", "all_gather_invariant", "all_to_all", "reduce_scatter"}


class Transfer(NamedTuple):
    """One array that every device sends, `times` times (in a scan: once a turn); its shape is one device's."""

    primitive: str
    shape: tuple[int, ...]
    dtype: str
    times: int

    @property
    def total_bytes(self) -> int:
        """Of all times together."""
        aval = jax.ShapeDtypeStruct(self.shape, self.dtype)
        return self.times * aval.size * aval.dtype.itemsize


def transfers(f: Callable, *args: Any) -> list[Transfer]:
    """All that f(*args) sends; of sums over devices only those that are scattered. Nothing is run."""
    return list(_walk(jax.make_jaxpr(f)(*args).jaxpr, 1))


def permuted(f: Callable, *args: Any) -> dict[tuple[tuple[int, ...], str], int]:
    """How often arrays of each (shape, dtype) are permuted by f(*args)."""
    count: dict[tuple[tuple[int, ...], str], int] = {}
    for each in transfers(f, *args):
        if each.primitive == "ppermute":
            count[each.shape, each.dtype] = count.get((each.shape, each.dtype), 0) + each.times
    return count


def _walk(jaxpr: Jaxpr, times: int) -> Iterator[Transfer]:
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name in COLLECTIVES:
            avals: list[Any] = [each.aval for each in eqn.invars]
            yield from (Transfer(name, aval.shape, str(aval.dtype), times) for aval in avals)
        inside = [inner for value in eqn.params.values() for inner in _jaxprs(value)]
        turns = eqn.params["length"] if name == "scan" else 1
        found = [each for inner in inside for each in _walk(inner, times * turns)]
        assert not found or name not in ("while", "cond"), f"how often a {name} sends is not known"
        yield from found


def _jaxprs(value: Any) -> Iterator[Jaxpr]:
    for each in value if isinstance(value, tuple | list) else (value,):
        if isinstance(each, ClosedJaxpr):
            yield each.jaxpr
        elif isinstance(each, Jaxpr):
            yield each


def computations(hlo: str) -> dict[str, list[str]]:
    """The lines of each computation of compiled HLO, in the order in which they are scheduled; the entry is ENTRY."""
    bodies: dict[str, list[str]] = {}
    name = ""
    for line in hlo.splitlines():
        if opened := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line):
            name = "ENTRY" if opened[1] else opened[2]
            bodies[name] = []
        elif name:
            bodies[name].append(line)
    return bodies


def executed(hlo: str, instruction: str) -> int:
    """How often a compiled program runs `instruction` (say collective-permute), loops counted turn by turn."""
    bodies = computations(hlo)

    def count(name: str) -> int:
        total = 0
        for line in bodies[name]:
            total += bool(re.search(rf" {instruction}(-start)?\(", line))
            for inner in re.findall(r"(?:body|to_apply|calls)=%?([\w.\-]+)", line):
                turns = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
                inside = count(inner)
                assert not inside or turns or " while(" not in line, "a loop that sends, but nobody knows how often"
                total += inside * (int(turns[1]) if turns else 1)
        return total

    return count("ENTRY")


def exposed(hlo: str) -> tuple[int, list[str]]:
    """How many permutes a schedule has, and those that span no loop, which a hop's attention is: one loop, of a turn at
    most, with all its tiles inside. A permute that is not asynchronous spans nothing."""
    sends, bare = 0, []
    for body in computations(hlo).values():
        open_since: dict[str, int] = {}
        loops = 0
        for line in body:
            sent = re.match(
                r"\s+(?:ROOT )?%?([\w.\-]+) = (\S+).* collective-permute(-start|-done)?\(%?([\w.\-]*)", line
            )
            if sent is None:
                loops += " while(" in line
            elif sent[3] == "-start":
                open_since[sent[1]] = loops
            else:
                sends += 1
                if sent[3] is None or loops == open_since.pop(sent[4]):
                    bare.append(f"{sent[1]} {sent[2]}")
    return sends, bare
