"""What an evaluation has finished, and what it says while it goes on."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ringattn.evaluation.scoring import Score
from ringattn.training.score import Scores

Result = dict[str, Any]


class Kept:
    """cells.jsonl: a line a finished cell, under a key of all it depends on. Lines are added, none is rewritten."""

    def __init__(self, path: Path):
        """Raises ValueError if the file cannot be read or written."""
        self._path = path
        self.results: dict[str, Result] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            content = path.read_bytes() if path.is_file() else b""
            whole = content.rfind(b"\n") + 1
            if whole < len(content) and jax.process_index() == 0:  # a start that was killed left half a line
                os.truncate(path, whole)
            for line in content[:whole].decode().splitlines():
                row = json.loads(line)
                self.results[row["key"]] = row["result"]
        except OSError as error:
            raise ValueError(
                f"cannot write to {path} ({error.strerror}): mend that, and give the command again"
            ) from error
        except (ValueError, LookupError, TypeError) as error:
            raise ValueError(f"{path} holds a damaged line ({error}): remove it, or use another --name") from error

    def add(self, key: str, result: Result) -> None:
        """By the first process alone. Raises ValueError if it cannot be written."""
        if jax.process_index() > 0:
            return
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, "result": result}) + "\n")
        except OSError as error:
            cure = "mend that, and give the command again: what was finished is kept"
            raise ValueError(f"cannot write to {self._path} ({error.strerror}): {cure}") from error


class Screen:
    """A live bar on a terminal, and a line a cell; only the first process speaks."""

    def __init__(self, cells: int):
        self._console = Console(quiet=jax.process_index() != 0, highlight=False, soft_wrap=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._live = Progress(*columns, console=self._console, disable=not self._console.is_terminal)
        self._task = self._live.add_task("cells", total=cells)
        self._cells, self._done = cells, 0

    def __enter__(self) -> "Screen":
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    @contextmanager
    def cell(self, name: str, rows: int) -> Iterator[Callable[[Score], Score]]:
        """A bar of the cell's own; yields what makes a `Score` move it."""
        task = self._live.add_task(name, total=rows)

        def counted(score: Score) -> Score:
            def moving(batches: Any) -> Iterator[Scores]:
                for scores in score(batches):
                    self._live.advance(task, len(scores.nats))
                    yield scores

            return moving

        try:
            yield counted
        finally:
            self._live.remove_task(task)

    def done(self, text: str) -> None:
        self._done += 1
        self._console.print(f"{self._done}/{self._cells}  {text}", markup=False)
        self._live.update(self._task, completed=self._done)
