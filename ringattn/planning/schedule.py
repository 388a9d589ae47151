"""Reads from the schedule of a compiled step how long its transfers take, and how much of that its compute hides.

The ops of a computation run one after the other. A transfer that the compiler has split into a start and a done runs
meanwhile. Of several, the link serves the one that is awaited first. A done waits for its transfer: that time is
exposed. So is all the time of a collective that is one op. Transfers inside a loop and around it do not share the link.
Copies to and from the host have links of their own.
"""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from ringattn.cost.program import Op, Program
from ringattn.planning.links import COLLECTIVES, HOST_COPIES, Links, Sent, host_copy

OpSeconds = Callable[[str, Op], float | int]
"""Returns the seconds of an op of a computation, apart from the computations that it runs."""
_START, _DONE = "async-collective-start", "async-collective-done"  # fusions of the TPU compiler
_STEP = "async_collective_fusion"  # their step that runs together with compute


@dataclass(frozen=True)
class Collective:
    """A collective or a copy to or from the host in the schedule. Bytes and seconds are per device and execution."""

    op: str
    part: str
    """A hop of the ring ('ring forward' or 'ring backward'), or else the pass: 'forward', 'backward' or 'update'."""
    array: str
    """Its first array, such as 'bf16[1,8,16384,128]'."""
    bytes: int
    """Bytes that a device sends."""
    count: float | int
    """Executions per step, with all iterations of loops."""
    is_asynchronous: bool
    link_seconds: float | None
    """Time on the link; None if its bandwidth is unknown."""
    compute_seconds: float | None
    """Compute between start and done; None if unknown."""
    exposed_seconds: float | None
    """Time for which the device waits."""
    hidden: float
    """Fraction of the time on the link during which the device computes, from 0 to 1."""


class _Transfer(NamedTuple):
    op: Op
    kind: str
    sent: Sent
    is_asynchronous: bool
    compute: float
    exposed: float


@dataclass
class _Pending:
    op: Op
    kind: str
    sent: Sent
    awaited: int
    """Index of its done among the ops of the computation."""
    computed: float
    """Compute before its start, in seconds."""
    left: float
    """Seconds on the link that it still needs."""


class Timeline:
    """The schedule of a compiled step on one device.

    Attributes:
      seconds: duration of the step, with the exposed transfers; compute alone: `compute`.
    """

    def __init__(self, program: Program, op_seconds: OpSeconds | None, links: Links):
        """`op_seconds` is None if no times are known: then all transfers count as exposed."""
        self._program, self._op_seconds, self._links = program, op_seconds, links
        self._durations: dict[str, tuple[float, float]] = {}
        self._transfers: dict[str, list[_Transfer]] = {}
        self._runs: dict[str, float] = {}
        self.seconds, self.compute = self._run(program.entry)
        self._count(program.entry, 1.0)

    def collectives(self) -> list[Collective]:
        """Returns all collectives and copies to and from the host, in the order of their computations."""
        found = []
        for name, transfers in self._transfers.items():
            around = Counter(filter(None, (_direction(op) for op in self._program.computations[name])))
            usual = around.most_common(1)[0][0] if around else "update"
            for each in transfers:
                link = each.sent.seconds
                timed = link is not None and self._op_seconds is not None
                found.append(
                    Collective(
                        op=each.kind,
                        part=_part(each.op, each.kind, usual),
                        array=re.findall(r"\w+\[[\d,]*\]", each.op.shape)[0],
                        bytes=each.sent.bytes,
                        count=self._runs.get(name, 0.0),
                        is_asynchronous=each.is_asynchronous,
                        link_seconds=link,
                        compute_seconds=each.compute if timed else None,
                        exposed_seconds=each.exposed if timed else None,
                        hidden=1 - min(each.exposed / link, 1.0) if timed and link else 0.0,
                    )
                )
        return [each for each in found if each.count]

    def _run(self, computation: str) -> tuple[float | int, float | int]:
        """Returns the duration of a computation and of its compute, and records its transfers."""
        if computation in self._durations:
            return self._durations[computation]
        now = computed = 0.0
        pending: dict[str, _Pending] = {}
        transfers: list[_Transfer] = []
        ops = self._program.computations[computation]
        awaited = {name: index for index, op in enumerate(ops) if (name := _awaited(op))}
        for op in ops:
            if (kind := self._started(op)) is not None and op.name in awaited:
                inner = self._collective(op) or op
                sent = self._links.sent(kind, inner)
                pending[op.name] = _Pending(inner, kind, sent, awaited[op.name], computed, sent.seconds or 0.0)
            elif (done := pending.pop(_awaited(op), None)) is not None:
                now += done.left
                transfers.append(_Transfer(done.op, done.kind, done.sent, True, computed - done.computed, done.left))
            elif (found := self._synchronous(op)) is not None:
                kind, inner = found
                sent = self._links.sent(kind, inner)
                now += sent.seconds or 0.0
                transfers.append(_Transfer(inner, kind, sent, False, 0.0, sent.seconds or 0.0))
            else:
                duration, compute = self._duration(computation, op)
                now, computed = now + duration, computed + compute
                _serve(pending, duration)
        self._durations[computation], self._transfers[computation] = (now, computed), transfers
        return now, computed

    def _duration(self, computation: str, op: Op) -> tuple[float | int, float | int]:
        called = self._program.calls_of(computation, op)
        if not called:
            own = 0.0 if self._op_seconds is None else self._op_seconds(computation, op)
            return own, own
        runs = [(self._run(name), times) for name, times in called]
        return sum(run[0] * times for run, times in runs), sum(run[1] * times for run, times in runs)

    def _count(self, computation: str, runs: float | int) -> None:
        self._runs[computation] = self._runs.get(computation, 0.0) + runs
        for op in self._program.computations[computation]:
            for name, times in self._program.calls_of(computation, op):
                self._count(name, runs * times)

    def _started(self, op: Op) -> str | None:
        """Returns the kind of the transfer that an op starts; None if it starts none."""
        if '"is_sync":true' in op.rest:
            return None
        if (copy := host_copy(op)) is not None:
            return copy
        base = op.kind.removesuffix("-start")
        if base in COLLECTIVES and base != op.kind:
            return base
        if op.kind == "async-start" or (op.kind == "fusion" and op.name.startswith(_START)):
            inner = self._collective(op)
            return None if inner is None else inner.kind.removesuffix("-start")
        return None

    def _synchronous(self, op: Op) -> tuple[str, Op] | None:
        """Returns the kind and the op of a transfer that is not awaited in its computation; None if `op` is none."""
        if (copy := host_copy(op)) is not None:
            return copy, op
        inner = self._collective(op)
        if inner is None or self._is_step(op):
            return None
        return "reduce-scatter" if "all-reduce-scatter" in (op.attribute("calls") or "") else inner.kind, inner

    def _collective(self, op: Op) -> Op | None:
        """Returns the collective that an op is or contains; None without one."""
        if op.kind.removesuffix("-start") in COLLECTIVES:
            return op._replace(kind=op.kind.removesuffix("-start"))
        called = op.attribute("calls") if op.kind in ("fusion", "async-start") else None
        inside = (self._collective(each) for each in self._program.computations.get(called or "", ()))
        return next((each for each in inside if each is not None), None)

    @staticmethod
    def _is_step(op: Op) -> bool:
        """Returns True for the steps of a transfer that the TPU compiler runs together with compute, and its end."""
        return (op.attribute("calls") or "").startswith(_STEP) or op.name.startswith(_DONE)


def _serve(pending: dict[str, _Pending], seconds: float | int) -> None:
    """Advances the pending transfers of each link by `seconds`, first those that are awaited first."""
    unused = dict.fromkeys((*HOST_COPIES, ""), seconds)
    for each in sorted(pending.values(), key=lambda each: each.awaited):
        link = each.kind if each.kind in HOST_COPIES else ""
        used = min(each.left, unused[link])
        each.left, unused[link] = each.left - used, unused[link] - used


def _awaited(op: Op) -> str:
    """Returns the name of the start that an op waits for; an empty text if it waits for none."""
    if op.kind.endswith("-done") and op.operands:
        return op.operands[0]
    return op.name.replace(_DONE, _START) if op.name.startswith(_DONE) else ""


def _direction(op: Op) -> str | None:
    """Returns the pass that an op belongs to by its name; None if the compiler gave it none."""
    source = re.search(r'op_name="([^"]*)"', op.rest)
    if source is None:
        return None
    return "backward" if "transpose(" in source[1] else "forward" if "jvp(" in source[1] else "update"


def _part(op: Op, kind: str, usual: str) -> str:
    """Returns `Collective.part`. `usual` is the pass of most ops of the same computation."""
    direction = _direction(op) or usual
    if kind == "collective-permute" and 'ppermute"' in op.rest:
        return "ring backward" if direction == "backward" else "ring forward"
    return direction
