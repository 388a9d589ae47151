"""Compiles several steps at once, each in another process, if the machine has the cores and the memory for it.

The other process runs this module.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import TypeVar

from ringattn import config
from ringattn.cost.memory import host_memory
from ringattn.mesh.axes import AXES
from ringattn.mesh.topology import arrange_devices
from ringattn.planning.compile import Target, needed
from ringattn.planning.devices import devices_of
from ringattn.planning.longest import Need
from ringattn.runs.signals import before_ending

CORES, MEMORY = 2, 5 * 2**30
"""Cores and bytes of memory that a compilation for 64 TPUs uses."""
Job = TypeVar("Job")
Result = TypeVar("Result")


def simultaneous() -> int:
    """Returns the number of steps that this machine can compile at once."""
    free = host_memory(free=True)
    by_memory = 1 if free is None else free // MEMORY
    return max(1, min((os.cpu_count() or 1) // CORES, by_memory))


def compile_all(function: Callable[[Job], Result], jobs: Sequence[Job]) -> list[Result]:
    """Returns the results of `function`, which compiles steps with `needed_apart`, for all jobs, in their order."""
    if simultaneous() == 1:
        return [function(job) for job in jobs]
    with ThreadPoolExecutor(simultaneous()) as pool:
        return list(pool.map(function, jobs))


def needed_apart(c: config.Config, target: Target) -> Need:
    """Returns `needed(c, target)`, compiled in another process if the machine can compile several steps at once.

    Raises ValueError if the other process fails.
    """
    if simultaneous() == 1:
        return needed(c, target)
    root = str(Path(__file__).parents[2])
    environ = os.environ | {"PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])}
    with tempfile.NamedTemporaryFile("w", suffix=".json", encoding="utf-8") as file:
        file.write(config.to_json(replace(c, mesh=replace(c.mesh, **target.mesh.shape))))
        file.flush()
        command = [sys.executable, "-m", __name__, file.name, target.topology, json.dumps(target.limit)]
        with subprocess.Popen(
            command, env=environ, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process:
            try:
                with before_ending(process.kill, immediately=True):
                    output, errors = process.communicate()
            finally:
                process.kill()
    if process.returncode:
        reason = (errors.strip().splitlines() or [f"status {process.returncode}"])[-1][:500]
        raise ValueError(f"compiling for {target.topology} in another process failed: {reason}")
    return Need(**json.loads(output.splitlines()[-1]))


def _main(path: str, topology: str, limit: str) -> None:
    c = config.load(Path(path))
    sizes = {name: vars(c.mesh)[name] for name in AXES}
    mesh = arrange_devices(sizes, list(devices_of(topology))[: math.prod(sizes.values())])
    print(json.dumps(asdict(needed(c, Target(topology, mesh, json.loads(limit))))))


if __name__ == "__main__":
    _main(*sys.argv[1:])
