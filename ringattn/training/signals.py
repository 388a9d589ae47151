"""Ctrl-C and SIGTERM end a run between two steps."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from ringattn.training.metrics import Screen


@dataclass
class Stop:
    number: int = 0
    """The signal that asks the run to end, 0 as long as there is none."""


@contextmanager
def stopped_by_signal(screen: Screen) -> Iterator[Stop]:
    """Notes a first Ctrl-C or SIGTERM, for the loop to finish its step; a second one acts as it always does."""
    stop, usual = Stop(), {}

    def put_back() -> None:
        for number, handler in usual.items():
            signal.signal(number, handler)

    def note(number: int, frame: FrameType | None) -> None:
        stop.number = number
        put_back()
        screen.say(f"{signal.Signals(number).name}: saving after this step; once more ends it at once")

    usual.update({number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)})
    try:
        yield stop
    finally:
        put_back()
