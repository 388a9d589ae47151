"""Ends a run that hangs, with the stacks of all its threads."""

import faulthandler
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import jax

from ringattn.mesh import board
from ringattn.mesh.processes import several_processes
from ringattn.units import duration_in_words

HUNG = 4
"""Exit status of a run that hangs."""
FACTOR = 10
"""A run hangs if nothing has completed for this many times the longest time that anything took before."""
LEAST_SECONDS = 600.0
"""Minimum seconds without progress before a run counts as hanging."""
PATIENT_SECONDS = 1800.0
"""The same before anything has completed, while programs compile or a checkpoint is started, and in the last write."""
WRITE_SECONDS = 30.0
"""Maximum seconds for writing the stacks: the file system may be what hangs."""
SUSPECT_SECONDS = 60.0
"""Seconds without progress before a process asks once per tick whether another one hangs."""
OTHERS_SECONDS = 10.0
"""Seconds that a process waits after it has written its stacks, while the other processes write theirs."""
TICK = 1.0
"""Maximum seconds between two looks at the clock."""
_HANGING = "hanging/"


class Watchdog:
    """Measures the time between calls of `progress`, and ends the process if it becomes far too long."""

    def __init__(self, file: Path):
        """`file` receives the stacks, such as hang-0.txt in a run directory."""
        self._file, self._ended = file, threading.Event()
        self._waited, self._longest, self._last = 0.0, 0.0, ""
        self._patient, self._since = False, time.monotonic()

    @property
    def limit(self) -> float:
        """Maximum seconds without progress."""
        return max(LEAST_SECONDS if self._last and not self._patient else PATIENT_SECONDS, FACTOR * self._longest)

    @contextmanager
    def patient(self) -> Iterator[None]:
        """Allows more time inside the context, which compiles programs."""
        self._patient = True
        try:
            yield
        finally:
            self._patient = False
            self._waited, self._since = 0.0, time.monotonic()

    @contextmanager
    def patient_after(self) -> Iterator[None]:
        """Allows more time after the context, where the last checkpoint is written."""
        try:
            yield
        finally:
            self._patient, self._waited = True, 0.0

    def progress(self, event: str) -> None:
        """Notes that `event`, such as 'step 12', has completed."""
        now = time.monotonic()
        if self._last and not self._patient:
            # `_waited` does not count the seconds of a suspended process, but only whole ticks.
            self._longest = max(self._longest, min(now - self._since, self._waited + 2 * TICK))
        self._waited, self._since, self._last = 0.0, now, event

    def watch(self) -> None:
        """Counts the seconds without progress, in a thread of its own. A suspended process does not count them."""
        before = time.monotonic()
        while not self._ended.wait(min(TICK, self.limit / 10)):
            now = time.monotonic()
            self._waited, before = self._waited + min(now - before, 2 * TICK), now
            if self._waited > self.limit or (self._waited > SUSPECT_SECONDS and _another_hangs()):
                self._end()

    def _end(self) -> None:
        after = f"after {self._last}" if self._last else "at the first step"
        waited = f"nothing has completed for {duration_in_words(self._waited)} {after}"
        if self._longest:
            waited += f"; the longest time between two results was {duration_in_words(self._longest)}"
        fix = f"stacks of all threads in {self._file}; run the same command again to resume"
        os.write(2, f"error: the run hangs: {waited}; {fix}\n".encode())
        timer = threading.Timer(WRITE_SECONDS, os._exit, [HUNG])
        timer.daemon = True
        timer.start()
        if several_processes():
            with suppress(Exception):  # process 0, which keeps the board, may have ended
                board.post(f"{_HANGING}{jax.process_index()}", "")
        try:
            with self._file.open("w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError:
            faulthandler.dump_traceback(2, all_threads=True)
        if several_processes():
            time.sleep(OTHERS_SECONDS)
        os._exit(HUNG)

    def stop(self) -> None:
        self._ended.set()


def _another_hangs() -> bool:
    with suppress(Exception):  # an error of the board must not end the thread that watches
        return several_processes() and bool(board.read(_HANGING))
    return False


@contextmanager
def watched(file: Path) -> Iterator[Watchdog]:
    """Yields a Watchdog that watches inside the context. `file` is that of `Watchdog`."""
    watchdog = Watchdog(file)
    threading.Thread(target=watchdog.watch, name="watchdog", daemon=True).start()
    try:
        yield watchdog
    finally:
        watchdog.stop()
