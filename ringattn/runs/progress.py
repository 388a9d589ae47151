"""The progress display of all scripts: a live progress bar on a terminal, plain lines otherwise."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import jax
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from ringattn.units import duration_in_words

COMPILING = "compiling"


class _Elapsed(ProgressColumn):
    """The elapsed time, such as 0:12."""

    def render(self, task: Task) -> Text:
        minutes, seconds = divmod(int(task.elapsed or 0), 60)
        return Text(f"{minutes}:{seconds:02}", style="progress.elapsed")


class _Remaining(TimeRemainingColumn):
    """The remaining time; for a task that first compiles a program, the elapsed time until the first progress."""

    def render(self, task: Task) -> Text:
        if COMPILING in task.fields and not task.completed:
            return Text.assemble(f"{COMPILING} ", _Elapsed().render(task))
        return super().render(task)


class Display:
    """A progress bar and printed lines, by default from process 0 only. The bar is live inside the context."""

    def __init__(
        self,
        total: int | None,
        done: int = 0,
        label: str = "",
        *,
        in_bytes: bool = False,
        every_process: bool = False,
        on_stderr: bool = False,
    ):
        """Counts from `done` to `total`, None if unknown. `in_bytes`: counts are bytes. `on_stderr`: print there.

        `every_process`: print from every process, without initializing JAX, which would claim the accelerator.
        """
        quiet = not every_process and jax.process_index() != 0
        self._console = Console(quiet=quiet, highlight=False, soft_wrap=True, stderr=on_stderr)
        count = DownloadColumn() if in_bytes else MofNCompleteColumn()
        columns = (BarColumn(), count, TextColumn("{task.description}"), _Remaining())
        self._live = Progress(*columns, console=self._console, disable=not self._console.is_terminal)
        self._task = self._live.add_task(label, total=total, completed=done)
        self._total, self._initial, self._start_time = total, done, time.monotonic()

    def __enter__(self) -> "Display":
        self._live.start()
        self._start_time = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    @property
    def is_terminal(self) -> bool:
        return self._console.is_terminal

    def print(self, text: str) -> None:
        """Prints a line above the bar."""
        self._console.print(text, markup=False)

    def update(self, done: int, description: str | None = None) -> None:
        """Sets the progress bar to `done`."""
        self._live.update(self._task, completed=done, description=description)

    def time_left(self, done: int) -> str:
        """Returns the estimated remaining time as text, from the mean speed inside the context."""
        assert self._total is not None, "time_left requires a total"
        seconds_per_unit = (time.monotonic() - self._start_time) / (done - self._initial)
        return duration_in_words(seconds_per_unit * (self._total - done))

    @contextmanager
    def waiting(self, text: str) -> Iterator[None]:
        """Shows `text` and the elapsed time inside the context, before the bar is live. Off a terminal, prints it."""
        if not self.is_terminal:
            self.print(text)
        columns = SpinnerColumn(), TextColumn("{task.description}"), _Elapsed()
        with Progress(*columns, console=self._console, transient=True, disable=not self.is_terminal) as line:
            line.add_task(text, total=None)
            yield

    @contextmanager
    def subtask(
        self, name: str, total: int | None = None, *, compiles: bool = False
    ) -> Iterator[Callable[[int], None]]:
        """Shows a second bar inside the context; yields a function that advances it by a count up to `total`, if known.

        `compiles`: the task first compiles a program. The bar shows the elapsed time until the task advances.
        """
        fields = {COMPILING: True} if compiles else {}
        task = self._live.add_task(name, total=total, **fields)
        try:
            yield lambda count: self._live.advance(task, count)
        finally:
            self._live.remove_task(task)


@contextmanager
def progress_bar(label: str, **options: bool) -> Iterator[Callable[[int, int], None]]:
    """Yields advance(done, total), which shows a progress bar from its first call. `options` are those of `Display`."""
    with ExitStack() as stack:
        shown: list[Display] = []

        def advance(done: int, total: int) -> None:
            if not shown:
                shown.append(stack.enter_context(Display(total, label=label, **options)))
            shown[0].update(done)

        yield advance
