"""Ctrl-C (SIGINT) and SIGTERM stop a run after the current step."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from ringattn.runs.progress import Display


@dataclass
class Stop:
    number: int = 0
    """Number of the signal received; 0 if none."""


@contextmanager
def stopped_by_signal(display: Display) -> Iterator[Stop]:
    """Records the first SIGINT or SIGTERM, so that the loop can finish its step; the second has its default effect."""
    stop, previous = Stop(), {}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def record(number: int, frame: FrameType | None) -> None:
        stop.number = number
        restore()
        display.print(f"{signal.Signals(number).name}: saving after this step; send it again to stop immediately")

    previous.update({number: signal.signal(number, record) for number in (signal.SIGINT, signal.SIGTERM)})
    try:
        yield stop
    finally:
        restore()
