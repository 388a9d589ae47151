"""Ends the processes of a run when one of them ends early, with a sentence that names it.

JAX notices the end of a process after 100 s, and then aborts the others; until then they hang in a collective. Here,
each process keeps a connection to process 0. The operating system closes the connections of a process that ends, and
TCP's keepalive finds hosts that do not answer. A thread of each process watches its connections. That of process 0
tells the others which process has ended.
"""

import atexit
import math
import os
import re
import selectors
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum

from ringattn.mesh.launchers import Place
from ringattn.mesh.rendezvous import Meeting

STATUS = 3
"""Exit status of a process that ends because another process has ended."""
GRACE = 3.0
"""Seconds until the end of another process ends this one. It may have a reason of its own to end at the same time."""
SETTLE = 15.0
"""Seconds for which a process whose communication has failed waits to learn which process has ended."""
EXIT_PATIENCE = 30.0
"""Seconds until a process that ends with an error is ended, although its threads may wait for other processes."""
EXIT_SECONDS = 1800.0
"""Seconds for which a process that has finished waits for the others, which may write the last checkpoint."""
SHOW_CURSOR = b"\x1b[?25h\n"
"""Shows the cursor, which a progress bar hides, and moves it below the bar."""
_CODES = "ABORTED|CANCELLED|DATA_LOSS|DEADLINE_EXCEEDED|FAILED_PRECONDITION|INTERNAL|UNAVAILABLE|UNKNOWN"


class End(StrEnum):
    """The way in which a process ends, which it announces."""

    FINISHED = "finished"
    FAILED = "ended with an error"
    STOPPED = "was stopped by a signal"


class _Peers:
    """The connections of this process to the others, and the thread that watches them."""

    def __init__(self, place: Place, meeting: Meeting):
        self.own_end: End | None = None
        self.own_status = 1
        self.all_finished = threading.Event()
        self.lost = threading.Event()
        """Set when another process has ended early."""
        self.hosts = meeting.hosts
        self._place, self._meeting = place, meeting
        self._sentence, self._deadline = "", math.inf
        self._finished, self._lock = set[int](), threading.Lock()

    def start(self) -> None:
        atexit.register(self._leave)  # before JAX's function, which would wait for other processes
        os.register_at_fork(after_in_child=self._close)  # a forked child would keep the connections open
        threading.Thread(target=self._watch, name="peers", daemon=True).start()

    def announce(self, end: End) -> None:
        """Tells the other processes how this one ends. Later calls have no effect."""
        if self.own_end is None:
            self.own_end = end
            if end is End.FAILED:
                self._deadline = time.monotonic() + EXIT_PATIENCE
            if self._place.index == 0:
                self._record(0, end)
            else:
                self._meeting.channels[0].send(end=end.name)

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            for index, channel in self._meeting.channels.items():
                selector.register(channel.connection, selectors.EVENT_READ, (index, channel))
            while True:
                ready = selector.select(timeout=0.2)
                for index, channel in [key.data for key, _ in ready]:
                    messages = channel.receive()
                    for message in messages or ():
                        self._handle(index, message)
                    if messages is None:
                        selector.unregister(channel.connection)
                        self._disconnected(index, channel.problem)
                if time.monotonic() > self._deadline:
                    self._end_process()

    def _handle(self, index: int, message: dict[str, str]) -> None:
        if "end" in message:
            self._record(index, End[message["end"]])
        elif "lost" in message:
            self._lose(message["lost"])
        elif "all_finished" in message:
            self.all_finished.set()

    def _record(self, index: int, end: End) -> None:
        """Records the end of process `index`, in process 0."""
        if end is not End.FINISHED:
            self._report(index, end)
            return
        with self._lock:
            self._finished.add(index)
            complete = len(self._finished) == self._place.count
        if complete:
            self._tell_all(all_finished="")
            self.all_finished.set()

    def _disconnected(self, index: int, problem: str) -> None:
        if self.all_finished.is_set() or index in self._finished:
            return
        self._report(index, f"does not answer ({problem})" if problem else "ended unexpectedly")

    def _report(self, index: int, reason: str) -> None:
        """Reports that process `index` has ended early to the others, and to this process if it is another one."""
        sentence = f"{self._meeting.members[index]} {reason}"
        if self._place.index == 0:
            self._tell_all(lost=sentence)
        if self._place.index != index:
            self._lose(sentence)

    def _tell_all(self, **message: str) -> None:
        for channel in self._meeting.channels.values():
            channel.send(**message)

    def _lose(self, sentence: str) -> None:
        if not self.lost.is_set():  # only the first process that ends is the cause
            self._sentence = sentence
            if self.own_end is not End.FAILED:
                self._deadline = time.monotonic() + GRACE
            self.lost.set()

    def _end_process(self) -> None:
        """Ends this process at once, although its main thread may be in a collective or a compiler."""
        failed = self.own_end is End.FAILED
        try:
            if os.isatty(1):
                os.write(1, SHOW_CURSOR)
            if not failed:
                os.write(2, f"{self._sentence}; run the same command again to resume\n".encode())
        finally:
            os._exit(self.own_status if failed else STATUS)

    def _leave(self) -> None:
        """Waits at exit until all processes have finished. After an error, ends this process without the others."""
        if self.own_end is None:
            self.announce(End.FAILED if "last_value" in vars(sys) else End.FINISHED)
        if self.own_end is End.FAILED:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(self.own_status)
        if not self.all_finished.wait(EXIT_SECONDS):
            missing = "another process" if self._place.index else self._unfinished()
            os.write(2, f"{missing} has not finished {EXIT_SECONDS:.0f} s after this process\n".encode())
            os._exit(STATUS)

    def _unfinished(self) -> str:
        return ", ".join(name for index, name in enumerate(self._meeting.members) if index not in self._finished)

    def _close(self) -> None:
        for channel in self._meeting.channels.values():
            channel.close()
        atexit.unregister(self._leave)


_peers: _Peers | None = None
"""None in a run of one process."""


def watch(place: Place, meeting: Meeting) -> None:
    """Starts to watch the other processes, until this process ends."""
    global _peers
    _peers = _Peers(place, meeting)
    _peers.start()


def hosts() -> list[str]:
    """Returns the name of the host of each process; [] in a run of one process."""
    return [] if _peers is None else _peers.hosts


@contextmanager
def announced_errors() -> Iterator[None]:
    """Announces an exception that ends this process, so that the others end too.

    If the exception is a consequence of the end of another process, this process ends with `STATUS` instead.
    """
    try:
        yield
    except BaseException as error:
        if _peers is not None:
            if _is_of_communication(error) and _peers.lost.wait(SETTLE):
                threading.Event().wait()  # the thread ends this process
            _peers.own_status = 2 if isinstance(error, ValueError) else 1
            _peers.announce(End.FAILED)
        raise


def announce_stop() -> None:
    """Announces that a signal ends this process."""
    if _peers is not None:
        _peers.announce(End.STOPPED)


def _is_of_communication(error: BaseException | None) -> bool:
    """Returns True for errors of XLA, and for errors that they cause: XLA also raises them as ValueError."""
    while error is not None:
        if type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError") or re.match(rf"({_CODES}): ", str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False
