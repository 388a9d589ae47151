"""Timing: all programs are compiled first, then each is timed once per round.

The speed of a machine drifts with its temperature and its other processes. Subjects are therefore compared by the ratio
of their times within a round, seconds apart. Each round has a new random order, so that no subject always follows the
same one. While one program is timed, the others keep only their inputs in memory; results are freed immediately.

The time of a call includes its memory allocation. However, after a program frees gigabytes, the next program has to
get its memory from the system page by page, which should not count. A program that follows a large one therefore makes
one untimed call first, as does every program with short calls.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import numpy as np

from ringattn.cost.memory import ProgramMemory, free_memory, program_memory

Key = TypeVar("Key")

SAMPLE_SECONDS = 0.05
"""Shortest sample; shorter calls are repeated."""
MIN_ROUNDS = 3
LARGE_BYTES = 2**30
"""Minimum temporary memory of a program that slows down the first call of the next one."""
MEMORY_SHARE = {"cpu": 0.5}
"""Maximum fraction of the free memory that a program may use, by platform (default 1). On CPU: of system memory."""


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
        """Temporary memory per device, without arguments and results, as reported by the compiler."""
        return self._memory().temporaries

    def check_memory(self) -> None:
        """Raises MemoryError if a call would use too much of the free memory."""
        memory, (first, *others) = self._memory(), self.devices
        sharing = 1 + len(others) if first.platform == "cpu" else 1  # simulated devices share the system's memory
        needed, free = (memory.temporaries + memory.results) * sharing, free_memory(first)
        share = MEMORY_SHARE.get(first.platform, 1.0)
        if free is not None and needed > share * free:
            limit = f"{share:.0%} of the {free / 2**30:.1f} GiB of free memory"
            raise MemoryError(f"needs {needed / 2**30:.1f} GiB, more than {limit}")

    def seconds(self, calls: int) -> float:
        """Mean time of a call, over `calls` consecutive calls."""
        simulated, result = self.devices[0].platform == "cpu", None
        begin = time.perf_counter()
        for _ in range(calls):
            result = self.compiled(self.inputs)
            if simulated:  # otherwise a device that starts the next call slows the others down
                jax.block_until_ready(result)
        jax.block_until_ready(result)
        return (time.perf_counter() - begin) / calls

    def _memory(self) -> ProgramMemory:
        memory = program_memory(self.compiled)
        assert memory is not None, "CPU, GPU and TPU compilers report memory"
        return memory


def compile_program(function: Callable[[Any], Any], inputs: Any) -> Program:
    """Compiles `function` for `inputs`; its mesh must be set. Raises the errors of tracing and compiling."""
    return Program(jax.jit(function).lower(inputs).compile(), inputs)


def calls_per_sample(program: Program) -> int:
    """Number of calls that take about SAMPLE_SECONDS. Raises MemoryError, and the errors of a first call."""
    program.check_memory()
    first = program.seconds(1)  # slower than later calls
    return 1 if first > 20 * SAMPLE_SECONDS else max(math.ceil(SAMPLE_SECONDS / program.seconds(1)), 1)


def rounds(programs: Mapping[Key, tuple[Program, int]], seconds: int) -> Iterator[dict[Key, float]]:
    """Yields the seconds per call of every program, once per round, for `seconds` and at least MIN_ROUNDS rounds.

    `programs` maps each key to a program and its `calls_per_sample`.
    """
    names, begin, done, previous = list(programs), time.perf_counter(), 0, None
    while done < MIN_ROUNDS or (time.perf_counter() - begin) * (done + 1) / done <= seconds:
        times = {}
        for number in np.random.default_rng(done).permutation(len(names)):
            program, calls = programs[names[number]]
            if calls > 1 or (previous is not None and previous.temp_bytes >= LARGE_BYTES):
                program.seconds(1)
            times[names[number]] = program.seconds(calls)
            previous = program
        yield times
        done += 1
