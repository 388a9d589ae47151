"""Communication between the processes of a multi-process run."""

import hashlib
import os
import sys
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from ringattn.mesh import peers
from ringattn.mesh.launchers import find_place
from ringattn.mesh.relay import start_relay
from ringattn.mesh.rendezvous import AbsentError, meet

LONGEST = 4096
"""Maximum number of bytes that `gather` sends."""


def join_processes() -> None:
    """Joins the other processes, with `jax.distributed.initialize`: see `devices.start`.

    If a process does not join within `rendezvous.PATIENCE`, reports it and ends this process with `peers.STATUS`.

    Raises ValueError if the environment is incomplete, or if process 0 cannot listen or refuses this process.
    """
    if jax.distributed.is_initialized() or (place := find_place(os.environ)) is None:
        return
    try:
        meeting = meet(place)
    except AbsentError as error:
        print(error, file=sys.stderr)
        raise SystemExit(peers.STATUS) from None
    peers.watch(place, meeting)
    # JAX's preemption service would replace the SIGTERM handler, and SIGTERM would have no effect: see `runs.signals`.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        place.address if place.index == 0 else start_relay(place.address),
        place.count,
        place.index,
        place.devices,
        cluster_detection_method="deactivate",
        shutdown_timeout_seconds=60,
    )


def several_processes() -> bool:
    """Returns True in a multi-process run, after `join_processes`. Never initializes devices in a single process."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_first() -> bool:
    """Returns True in process 0. Never initializes devices in a single process."""
    return not several_processes() or jax.process_index() == 0


def host_of(device: Any) -> str:
    """Returns a name for the host of a JAX device. Absent devices, as for compilation, have one process per host."""
    names = peers.hosts()
    return names[device.process_index] if names else str(device.process_index)


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
