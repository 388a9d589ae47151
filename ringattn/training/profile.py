"""Traces a few steps with the JAX profiler, to view at https://ui.perfetto.dev."""

from pathlib import Path

import jax

from ringattn.config import option
from ringattn.runs.progress import Display
from ringattn.training.recorder import Recorder


class Profile:
    """Traces steps START to STOP (inclusive, from 1) of a launch in process 0. Leaving the context ends the trace.

    Each stage of a launch has its own Profile with the same arguments, so a trace also ends at the end of its stage.
    The logged speed excludes starting and writing the trace, but tracing can slow down the traced steps.
    """

    def __init__(self, steps: str | None, start_step: int, end_step: int, directory: Path, display: Display):
        """`steps` is 'START:STOP' or None. Raises ValueError if STOP exceeds the launch, `start_step` to `end_step`."""
        self._directory, self._display, self._tracing = directory, display, False
        self._first, self._last = (start_step + int(number) for number in (steps or "0:0").split(":"))
        if self._last > end_step:
            count = end_step - start_step
            launch = f"profile={steps!r}, but this launch has {count} steps, {start_step + 1} to {end_step}"
            raise ValueError(f"{launch}; use --profile 1:{count}, or more --{option('train.steps')}")
        self._requested = steps is not None and jax.process_index() == 0

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *_: object) -> None:
        if self._tracing:
            self._stop("incomplete")

    def before(self, step: int, recorder: Recorder) -> None:
        """Starts the trace before its first step, after the devices have finished the preceding step."""
        if self._requested and step == self._first:
            recorder.flush()
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # Python function calls would bury the device events
            try:
                jax.profiler.start_trace(self._directory, create_perfetto_trace=True, profiler_options=options)
                self._tracing = True
            except Exception as error:  # a failed profile must not stop the run
                self._display.print(f"profile failed: {error}")
            recorder.restart_clock()

    def after(self, step: int, recorder: Recorder) -> None:
        """Ends the trace after its last step and prints its path."""
        if self._tracing and step == self._last:
            recorder.flush()
            self._stop(f"steps {self._first} to {self._last}")
            recorder.restart_clock()

    def _stop(self, label: str) -> None:
        self._tracing = False
        try:
            jax.profiler.stop_trace()
            traces = sorted(self._directory.rglob("perfetto_trace.json.gz"), key=lambda path: path.stat().st_mtime)
            self._display.print(f"profile ({label}): open {traces[-1]} at https://ui.perfetto.dev")
        except Exception as error:
            self._display.print(f"profile failed: {error}")
