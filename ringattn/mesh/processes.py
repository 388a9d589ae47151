"""Communication between the processes of a multi-process run."""

import hashlib
import os

import jax
import numpy as np
from jax.experimental import multihost_utils

LONGEST = 4096
"""Maximum number of bytes that `gather` sends."""


def join_processes() -> None:
    """Calls `jax.distributed.initialize` in a multi-process environment: see `devices.start`. Raises ValueError."""
    environ = os.environ
    tasks, hosts = environ.get("SLURM_STEP_NUM_TASKS", "1"), environ.get("TPU_WORKER_HOSTNAMES", "")
    multi_process = "JAX_COORDINATOR_ADDRESS" in environ or tasks != "1" or "," in hosts
    if not multi_process or jax.distributed.is_initialized():
        return
    # JAX's preemption service would replace the SIGTERM handler, and SIGTERM would have no effect: see `runs.signals`.
    jax.config.update("jax_enable_preemption_service", False)
    count, index = environ.get("JAX_NUM_PROCESSES"), environ.get("JAX_PROCESS_ID")
    try:  # JAX itself reads only the address from the environment; with None, it detects the cluster
        jax.distributed.initialize(
            num_processes=int(count) if count else None, process_id=int(index) if index else None
        )
    except ValueError as error:
        fix = "set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID"
        raise ValueError(f"cannot join the other processes ({error}); {fix}") from None


def several_processes() -> bool:
    """Returns True in a multi-process run, after `join_processes`. Never initializes devices in a single process."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_first() -> bool:
    """Returns True in process 0. Never initializes devices in a single process."""
    return not several_processes() or jax.process_index() == 0


def gather(text: str) -> list[str]:
    """Returns the texts of all processes, which must all call it, in order. Truncates texts to `LONGEST` bytes."""
    if not several_processes():
        return [text]
    padded = np.frombuffer(text.encode()[:LONGEST].ljust(LONGEST, b"\0"), np.uint8)
    rows = multihost_utils.process_allgather(padded)
    return [row.tobytes().rstrip(b"\0").decode(errors="ignore") for row in rows]


def check_same(name: str, text: str) -> None:
    """Raises ValueError in every process unless `text` is equal in all; `name` is used in messages."""
    digests = gather(hashlib.sha256(text.encode()).hexdigest())
    if len(set(digests)) > 1:
        index = jax.process_index()
        other = next(i for i, digest in enumerate(digests) if digest != digests[index])
        problem = f"{name} of process {index} differs from that of process {other}"
        raise ValueError(f"{problem}; start all processes with the same command and the same files")
