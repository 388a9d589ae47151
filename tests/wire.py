"""Transfers between devices, read from the jaxpr or the compiled HLO of a program."""

import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr

COLLECTIVES = {"ppermute", "all_gather", "all_gather_invariant", "all_to_all", "reduce_scatter"}


class Transfer(NamedTuple):
    """An array that every device sends `times` times (in a scan: once per iteration). The shape is local."""

    primitive: str
    shape: tuple[int, ...]
    dtype: str
    times: int

    @property
    def total_bytes(self) -> int:
        """Bytes of all `times` sends."""
        aval = jax.ShapeDtypeStruct(self.shape, self.dtype)
        return self.times * aval.size * aval.dtype.itemsize


def transfers(f: Callable, *args: Any) -> list[Transfer]:
    """Returns the transfers of f(*args) without running it. Of reductions it counts only reduce-scatters."""
    return list(_walk(jax.make_jaxpr(f)(*args).jaxpr, 1))


def permuted(f: Callable, *args: Any) -> dict[tuple[tuple[int, ...], str], int]:
    """Returns {(shape, dtype): how many times f(*args) permutes such an array}."""
    count: dict[tuple[tuple[int, ...], str], int] = {}
    for transfer in transfers(f, *args):
        if transfer.primitive == "ppermute":
            key = transfer.shape, transfer.dtype
            count[key] = count.get(key, 0) + transfer.times
    return count


def _walk(jaxpr: Jaxpr, times: int) -> Iterator[Transfer]:
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name in COLLECTIVES:
            avals: list[Any] = [invar.aval for invar in eqn.invars]
            yield from (Transfer(name, aval.shape, str(aval.dtype), times) for aval in avals)
        inside = [inner for value in eqn.params.values() for inner in _jaxprs(value)]
        iterations = eqn.params["length"] if name == "scan" else 1
        found = [transfer for inner in inside for transfer in _walk(inner, times * iterations)]
        assert not found or name not in ("while", "cond"), f"the number of sends in a {name} is unknown"
        yield from found


def _jaxprs(value: Any) -> Iterator[Jaxpr]:
    for item in value if isinstance(value, tuple | list) else (value,):
        if isinstance(item, ClosedJaxpr):
            yield item.jaxpr
        elif isinstance(item, Jaxpr):
            yield item


def computations(hlo: str) -> dict[str, list[str]]:
    """Returns the lines of each computation of compiled HLO, in scheduled order. The entry computation is ENTRY."""
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
    """Counts the runs of `instruction` (e.g. collective-permute) in a compiled program, with every loop iteration."""
    bodies = computations(hlo)

    def count(name: str) -> int:
        total = 0
        for line in bodies[name]:
            total += bool(re.search(rf" {instruction}(-start)?\(", line))
            for inner in re.findall(r"(?:body|to_apply|calls)=%?([\w.\-]+)", line):
                trip_count = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
                inside = count(inner)
                assert not inside or trip_count or " while(" not in line, "a loop that sends, of unknown trip count"
                total += inside * (int(trip_count[1]) if trip_count else 1)
        return total

    return count("ENTRY")


def exposed(hlo: str) -> tuple[int, list[str]]:
    """Returns the number of permutes in a schedule, and the exposed ones: those that do not span a hop's attention.

    The attention of a hop is one Pallas kernel, or one loop of at most one iteration with all tiles inside. A
    synchronous permute spans nothing.
    """
    sends, exposed_sends = 0, []
    for body in computations(hlo).values():
        open_since: dict[str, int] = {}
        attentions = 0
        for line in body:
            sent = re.match(
                r"\s+(?:ROOT )?%?([\w.\-]+) = (\S+).* collective-permute(-start|-done)?\(%?([\w.\-]*)", line
            )
            if sent is None:
                attentions += " while(" in line or "tpu_custom_call" in line
            elif sent[3] == "-start":
                open_since[sent[1]] = attentions
            else:
                sends += 1
                if sent[3] is None or attentions == open_since.pop(sent[4]):
                    exposed_sends.append(f"{sent[1]} {sent[2]}")
    return sends, exposed_sends
