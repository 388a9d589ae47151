"""How it is timed: all is compiled first, then every subject takes its turn in every round.

A machine's speed drifts, with heat and with what else runs. Subjects that are compared are therefore measured within
seconds of each other, again and again, and it is the ratio within a round that counts; a round's order is drawn anew,
so that nobody always follows the same neighbour. While one is timed, of the others only the inputs are held: results
are dropped at once. Memory that a subject claims anew for every call is part of its time. But one that gives back
gigabytes leaves the next without any, to claim its own page by page: that is no part of the next one's time, so whoever
follows such a subject makes a call untimed first. So does whoever's calls are short.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

Key = TypeVar("Key")

SAMPLE = 0.05
"""Seconds that a sample should take at least: shorter calls are repeated."""
ROUNDS = 3
"""At least so many."""
LARGE = 2**30
"""Temporary bytes that the next subject feels."""
SHARE = {"cpu": 0.5}
"""Of the free memory, how much a program may take where it is not a device's own: all else lives there, too."""


@dataclass(frozen=True)
class Program:
    """A compiled function with its inputs."""

    compiled: jax.stages.Compiled
    inputs: Any

    @property
    def devices(self) -> list[Any]:
        return list(jax.tree.leaves(self.inputs)[0].sharding.device_set)

    @property
    def temp_bytes(self) -> int:
        """Memory that a device needs beside arguments and results, as the compiler has planned it."""
        return self._memory().temp_size_in_bytes

    def check_memory(self) -> None:
        """Raises MemoryError if a call would take too much of what is free."""
        memory, (first, *others) = self._memory(), self.devices
        together = 1 + len(others) if first.platform == "cpu" else 1  # simulated devices share the system's memory
        needed, free = (memory.temp_size_in_bytes + memory.output_size_in_bytes) * together, free_bytes(first)
        share = SHARE.get(first.platform, 1.0)
        if free is not None and needed > share * free:
            there = f"{free / 2**30:.1f} GiB that are free"
            raise MemoryError(f"it needs {needed / 2**30:.1f} GiB, more than {share:.0%} of the {there}")

    def seconds(self, calls: int) -> float:
        """Of one call, as a mean over `calls` in a row."""
        simulated, result = self.devices[0].platform == "cpu", None
        begin = time.perf_counter()
        for _ in range(calls):
            result = self.compiled(self.inputs)
            if simulated:  # a device that begins the next call already takes a core from those still at this one
                jax.block_until_ready(result)
        jax.block_until_ready(result)
        return (time.perf_counter() - begin) / calls

    def _memory(self) -> Any:
        memory = self.compiled.memory_analysis()
        assert memory is not None, "the compilers for CPU, GPU and TPU all tell"
        return memory


def compiled(function: Callable[[Any], Any], inputs: Any) -> Program:
    """`function`, whose mesh is set, for `inputs`; raises what tracing and compiling raise."""
    return Program(jax.jit(function).lower(inputs).compile(), inputs)


def free_bytes(device: Any) -> int | None:
    """Of the device's own memory, or of the system's where it has none; None where nobody tells."""
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    system = Path("/proc/meminfo")
    if device.platform != "cpu" or not system.is_file():
        return None
    lines = dict(line.split(":", 1) for line in system.read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024


def calls_a_sample(program: Program) -> int:
    """How many calls last about SAMPLE; raises what a first call may raise."""
    program.check_memory()
    first = program.seconds(1)  # which is slower than others
    return 1 if first > 20 * SAMPLE else max(math.ceil(SAMPLE / program.seconds(1)), 1)


def rounds(programs: Mapping[Key, tuple[Program, int]], seconds: int) -> Iterator[dict[Key, float]]:
    """Seconds a call of each program, once a round, until `seconds` are over; at least ROUNDS rounds.

    With each program comes the number of its calls in a sample.
    """
    names, begin, done, before = list(programs), time.perf_counter(), 0, None
    while done < ROUNDS or (time.perf_counter() - begin) * (done + 1) / done <= seconds:
        found = {}
        for number in np.random.default_rng(done).permutation(len(names)):
            program, calls = programs[names[number]]
            if calls > 1 or (before is not None and before.temp_bytes >= LARGE):
                program.seconds(1)
            found[names[number]] = program.seconds(calls)
            before = program
        yield found
        done += 1
