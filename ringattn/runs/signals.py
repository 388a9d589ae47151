"""Ctrl-C (SIGINT) and SIGTERM: a script ends with one line and status 128 + n; a training loop first saves.

A Python signal handler is not sufficient. It runs in the main thread between two bytecode instructions, so it waits for
XLA compilation, and an exception that it raises is lost in a callback of the garbage collector (JAX has one) or in a
destructor. Python's C handler, in contrast, writes the signal number to a pipe at once (`signal.set_wakeup_fd`). In a
script, a thread reads the pipe and ends the process with `os._exit`, which unwinds no stack, runs no destructors and
does not wait for XLA's threads. No data is lost: files are written atomically or row by row.

This module imports only the standard library, because scripts/startup.py loads it before JAX.
"""

import atexit
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SHOW_CURSOR = b"\x1b[?25h\n"
"""Shows the cursor, which a progress bar hides, and moves it below the bar."""


class _Script:
    """Signal handling in the process of a script."""

    def __init__(self, hint: str):
        self.claims: list[Callable[[int], None]] = []
        """Handlers that each take one signal instead of ending the process. The last one takes the next signal."""
        self.cleanups: list[Callable[[], None]] = []
        """Functions to call in the main thread before a signal ends the process."""
        self.immediate: list[Callable[[], None]] = []
        """Functions to call at once before a signal ends the process."""
        self._hint, self._ending = hint, threading.Lock()

    def listen(self) -> None:
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(reader,), name="signals", daemon=True).start()
        self.register()

    def register(self) -> None:
        """Registers the handlers, except for signals that were ignored when the process started."""
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    signal.signal(number, self._clean_up)

    def _watch(self, reader: int) -> None:
        cleaning = False
        while True:
            number = os.read(reader, 1)[0]
            if number not in SIGNALS:
                continue
            if claim := self._take_claim():
                # In a separate thread, so that a second signal ends the process even if printing hangs in the first.
                threading.Thread(target=claim, args=(number,), daemon=True).start()
            elif self.cleanups and not cleaning:
                cleaning = True
            else:
                self._finish(number)

    def _take_claim(self) -> Callable[[int], None] | None:
        with suppress(IndexError):  # the main thread may remove a claim at any time
            return self.claims.pop()

    def _clean_up(self, number: int, frame: FrameType | None) -> None:
        """Runs the cleanups in the main thread, so that this thread cannot rewrite what they remove."""
        if self.cleanups:
            try:
                for cleanup in self.cleanups:
                    cleanup()
            finally:
                self._finish(number)

    def _finish(self, number: int) -> None:
        try:
            for cleanup in list(self.immediate):
                cleanup()
        finally:
            self._end(number)

    def _end(self, number: int) -> None:
        if self._ending.acquire(False):
            try:
                if os.isatty(1):
                    os.write(1, SHOW_CURSOR)
                os.write(2, f"stopped by {signal.Signals(number).name}{self._hint}\n".encode())
            finally:
                os._exit(128 + number)


_script: _Script | None = None
"""None in a process that only imports ringattn, such as a notebook."""


def end_on_signals(hint: str = "") -> None:
    """Makes SIGINT and SIGTERM end this process at any moment, with one line on stderr and status 130 or 143.

    Call it first in the main thread of a script. `hint` is appended to the line, such as 'run the same command again to
    resume'.
    """
    global _script
    _script = _Script(hint and f"; {hint}")
    _script.listen()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # os._exit would lose printed lines
    # A forked child that wrote to the pipe would end its parent. During interpreter shutdown, no thread could end the
    # process. atexit calls functions in reverse order of registration.
    os.register_at_fork(after_in_child=_restore_defaults)
    atexit.register(_restore_defaults)


def _restore_defaults() -> None:
    global _script
    _script = None
    signal.set_wakeup_fd(-1)
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)


@contextmanager
def before_ending(cleanup: Callable[[], None], *, immediately: bool = False) -> Iterator[None]:
    """Calls `cleanup` if a signal ends a script in this context. Outside scripts, an exception unwinds the stack.

    `cleanup` runs in the main thread, which may be in a compiler for minutes. `immediately`: it runs at once in another
    thread. It must then not remove what the main thread writes.
    """
    cleanups = [] if _script is None else _script.immediate if immediately else _script.cleanups
    cleanups.append(cleanup)
    try:
        yield
    finally:
        cleanups.remove(cleanup)


class Stop:
    """Records the first SIGINT or SIGTERM after `arm`, so that a loop can stop after its step."""

    def __init__(self, report: Callable[[str], None]):
        self.number = 0
        """Number of the signal received; 0 if none."""
        self._report, self._previous = report, dict[int, Any]()
        self._armed, self._recorded = False, threading.Event()

    def arm(self) -> None:
        """Starts to record and report the first signal. In a notebook, this works only in the main thread."""
        if _script is not None:
            self._armed = True
            _script.claims.append(self._record)
        elif threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in SIGNALS}

    def disarm(self) -> None:
        """Ends the recording. Afterwards, `number` does not change."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
        if _script is not None and self._armed:
            self._armed = False
            try:
                _script.claims.remove(self._record)
            except ValueError:  # a signal took it, and `_record` may still run in another thread
                self._recorded.wait()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.disarm()
        self._record(number)

    def _record(self, number: int) -> None:
        try:
            self._report(f"{signal.Signals(number).name}: saving after this step; send it again to stop immediately")
        finally:  # after the line, because the loop may end the process at once
            self.number = number
            self._recorded.set()


@contextmanager
def stopped_by_signal(report: Callable[[str], None]) -> Iterator[Stop]:
    """Yields a Stop, and disarms it at the end. `report` prints a line.

    Before `arm`, and after the first signal, a signal has its usual effect: it ends a script, and SIGINT raises
    KeyboardInterrupt in a notebook.
    """
    stop = Stop(report)
    try:
        yield stop
    finally:
        stop.disarm()
