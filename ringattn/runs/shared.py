"""Output directories that only one launch writes, and that all of its processes see."""

import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from ringattn import config
from ringattn.config import option
from ringattn.mesh import peers
from ringattn.mesh.devices import join
from ringattn.mesh.processes import gather, is_first, several_processes
from ringattn.runs.checkpoint import saved_steps
from ringattn.runs.lock import check_free, locked
from ringattn.runs.signals import before_ending

LOCK = ".lock"
"""Name of the lock file in an output directory."""
PATIENCE = 5.0
"""Maximum seconds until a process must see what process 0 has written. Network file systems cache."""


@contextmanager
def claimed(directories: Sequence[Path], section: config.Mesh, fix: str, unwritable_fix: str) -> Iterator[None]:
    """Joins the processes of `section`, and holds the locks of `directories` inside the context, in process 0 only.

    Does not initialize the devices of a single process. When another process ends early, ends this one: see `peers`.

    Raises:
      ValueError: in every process, if another launch holds a lock or a directory cannot be written (see
        `lock.locked`, also for the fixes), or if the processes cannot join.
    """
    if not several_processes():
        # A second job that joins at the same address makes the coordinator abort the first one, so it must not join.
        for directory in directories:
            check_free(directory / LOCK, directory, fix)
    join(section)
    with ExitStack() as stack:
        refusal = ""
        try:
            for directory in directories if is_first() else ():
                stack.enter_context(locked(directory / LOCK, directory, fix, unwritable_fix))
        except ValueError as error:
            refusal = str(error)
        refusal = gather(refusal)[0]
        if refusal:
            raise ValueError(refusal)
        with peers.announced_errors(), before_ending(peers.announce_stop, immediately=True):
            yield


def check_shared(directory: Path) -> None:
    """Raises ValueError in every process unless all of them see the run directory that process 0 has locked."""
    if not several_processes():
        return
    file = directory / gather(f".shared-{uuid.uuid4().hex}")[0]
    try:
        with suppress(OSError):  # process 0 does not see the file either, and all processes raise the error
            if is_first():
                file.touch()
        answers = gather(repr(_appears(directory, file.exists)))
    finally:
        if is_first():
            file.unlink(missing_ok=True)
    hosts = gather(socket.gethostname())
    blind = [_process(index, hosts) for index, answer in enumerate(answers) if answer != repr(True)]
    if blind:
        problem = f"{directory} of {_process(0, hosts)} is not visible to {_in_words(blind)}"
        raise ValueError(f"{problem}; use a --{option('log.directory')} on a file system that all hosts share")


def newest_step(directory: Path) -> int:
    """Returns the step of the newest checkpoint in a run directory, the same in all processes; 0 if there is none.

    Raises ValueError in every process unless all of them see that checkpoint.
    """
    step = max(saved_steps(directory / "checkpoints"), default=0)
    if not several_processes():
        return step
    newest = int(gather(str(step))[0])
    _appears(directory, lambda: newest == max(saved_steps(directory / "checkpoints"), default=0))
    steps = gather(str(max(saved_steps(directory / "checkpoints"), default=0)))
    hosts = gather(socket.gethostname())
    different = [f"{step} for {_process(index, hosts)}" for index, step in enumerate(steps) if int(step) != newest]
    if different:
        problem = f"the newest checkpoint in {directory} is {newest} for {_process(0, hosts)}, {_in_words(different)}"
        raise ValueError(f"{problem}; use a --{option('log.directory')} on a file system that all hosts share")
    return newest


def _appears(directory: Path, seen: Callable[[], bool]) -> bool:
    """Waits until `seen` returns True, at most `PATIENCE` seconds. Returns its last value."""
    end = time.monotonic() + PATIENCE
    while True:
        for parent in reversed([directory.absolute(), *directory.absolute().parents]):
            with suppress(OSError):  # opening a directory invalidates NFS's cache of missing names in it
                os.scandir(parent).close()
        if seen() or time.monotonic() > end:
            return seen()
        time.sleep(0.1)


def _process(index: int, hosts: list[str]) -> str:
    return f"process {index} on host {hosts[index]}"


def _in_words(names: list[str]) -> str:
    return ", ".join(names[:3]) + f" and {len(names) - 3} others" * (len(names) > 3)
