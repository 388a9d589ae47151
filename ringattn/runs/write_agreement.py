"""Agreement of all processes on whether a checkpoint was written: a write that fails in one fails in all.

Orbax would let the others wait for the one that failed.
"""

import time
from itertools import count

import jax

from ringattn.mesh import board
from ringattn.mesh.processes import several_processes

_MAX_SECONDS = 1200
"""Maximum seconds to wait for the writes of other processes."""
_POLL_SECONDS = 0.2
"""Seconds between two questions whether the other processes have finished."""
_FAILED = "failed/"
_instances = count()


class PeerError(Exception):
    """Ends the write of a checkpoint that another process could not write."""


class WriteAgreement:
    """Outcomes of one write after another. All processes create their instances in the same order."""

    def __init__(self) -> None:
        self._instance, self._writes = next(_instances), 0

    def begin(self) -> None:
        """Begins the next write."""
        self._writes += 1

    def forget_previous(self) -> None:
        """Removes the outcome of the write before this one, which all processes must have left."""
        if jax.process_index() == 0:
            board.remove(self._key(self._writes - 1))

    def fail(self, problem: str) -> None:
        """Tells the other processes that the current write has failed here."""
        if several_processes():
            board.post(f"{self._key(self._writes)}{_FAILED}{jax.process_index()}", problem)

    def meet(self, *, key: str, timeout_ms: int) -> None:
        """Waits, in the thread of a write, until all processes have called this function with `key`.

        Raises PeerError if the write has failed in one of them, and TimeoutError. A barrier function of Orbax.
        """
        if not several_processes():
            return
        write = self._key(self._writes)
        board.post(f"{write}{key}/arrived/{jax.process_index()}", "")
        end = time.monotonic() + min(timeout_ms / 1000, _MAX_SECONDS)
        while not board.read(f"{write}{key}/complete/"):
            # Only process 0 reads the keys of all processes.
            if jax.process_index() == 0 and len(board.read(f"{write}{key}/arrived/")) == jax.process_count():
                board.post(f"{write}{key}/complete/0", "")
            for process, problem in board.read(f"{write}{_FAILED}").items():
                raise PeerError(f"in process {process}: {problem}")
            if time.monotonic() > end:
                raise TimeoutError(f"another process has not written its part in {_MAX_SECONDS} s")
            time.sleep(_POLL_SECONDS)

    def _key(self, write: int) -> str:
        return f"checkpoints/{self._instance}/{write}/"
