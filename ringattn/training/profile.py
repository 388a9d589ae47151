"""A trace of a few steps, for https://ui.perfetto.dev."""

from pathlib import Path

import jax

from ringattn.training.metrics import Recorder, Screen


class Profile:
    """Traces steps START to STOP of a start, counted from 1, the last one included; a context that ends the trace.

    A start may go through several stages, each with a Profile of its own, all told the same: a trace ends with a stage.

    Only the first process traces itself. The time that it takes is not counted in the speed of the steps between which
    it begins and ends; within, tracing itself may slow them down.
    """

    def __init__(self, steps: str | None, begin: int, end: int, folder: Path, screen: Screen):
        """`steps` is 'START:STOP' or None; the start goes from step `begin` to `end`. ValueError if it ends before."""
        self._folder, self._screen, self._tracing = folder, screen, False
        self._first, self._last = (begin + int(number) for number in (steps or "0:0").split(":"))
        if self._last > end:
            there = f"profile={steps!r}, but this start has {end - begin} steps to do, {begin + 1} to {end}"
            raise ValueError(f"{there}: use --profile 1:{end - begin}, or more --train.steps")
        self._wanted = steps is not None and jax.process_index() == 0

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *_: object) -> None:
        if self._tracing:
            self._stop("cut short")

    def before(self, step: int, recorder: Recorder) -> None:
        """Begins to trace if it is time; what the devices still do is waited for."""
        if self._wanted and step == self._first:
            recorder.settle()
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # calls of Python functions would crowd out the devices' work
            try:
                jax.profiler.start_trace(self._folder, create_perfetto_trace=True, profiler_options=options)
                self._tracing = True
            except Exception as error:  # a profile is not worth a run
                self._screen.say(f"no profile: {error}")
            recorder.restart_clock()

    def after(self, step: int, recorder: Recorder) -> None:
        """Ends the trace if it is time, and says where it lies."""
        if self._tracing and step == self._last:
            recorder.settle()
            self._stop(f"steps {self._first} to {self._last}")
            recorder.restart_clock()

    def _stop(self, what: str) -> None:
        self._tracing = False
        try:
            jax.profiler.stop_trace()
            found = sorted(self._folder.rglob("perfetto_trace.json.gz"), key=lambda path: path.stat().st_mtime)
            self._screen.say(f"profile ({what}): open {found[-1]} at https://ui.perfetto.dev")
        except Exception as error:
            self._screen.say(f"no profile: {error}")
