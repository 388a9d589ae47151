"""An evaluation from its config to the folders of the runs: cell by cell, each kept as soon as it is done."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ringattn import config
from ringattn.config import LOSSES
from ringattn.data import DEEP, Tokenizer, check_tokenizer, read, read_all
from ringattn.evaluation import losses, retrieval
from ringattn.evaluation.report import in_words, report
from ringattn.evaluation.subject import Score, Subject, find
from ringattn.mesh import start

Result = dict[str, Any]
MEASURES = dict(zip(LOSSES, (losses.by_position, losses.by_context, losses.by_kind), strict=True))


@dataclass(frozen=True)
class Cell:
    task: str
    length: int
    depth: float | None
    """None where nothing lies at a depth of choice."""


def evaluate(c: config.Evaluation) -> int:
    """Evaluates all runs, from where an earlier start of the same evaluation was stopped, and tells what came of it.

    Returns the process's exit status: 0, or 130 after Ctrl-C. Raises ValueError, with a cure, where config, runs, text
    and devices do not fit each other, before anything is computed.
    """
    subjects = [find(path, c) for path in c.runs]
    if len({subject.name for subject in subjects}) < len(subjects):
        raise ValueError(f"runs={c.runs}: two of them are of one name: evaluate them one after another")
    mesh = start(c.mesh)
    texts = {subject.name: _checked(subject, c, mesh) for subject in subjects}
    found: dict[str, list[Result]] = {}
    try:
        with Screen(len(subjects) * len(list(cells(c)))) as screen:
            for subject in subjects:
                found[subject.name] = _evaluated(subject, c, mesh, texts[subject.name], screen)
    except KeyboardInterrupt:
        print("stopped: the same command goes on from here")
        return 130
    if jax.process_index() == 0:
        folders = {subject.name: folder_of(subject, c) for subject in subjects}
        for subject in subjects:
            facts = {"step": subject.step, "weights": subject.weights}
            report({subject.name: found[subject.name]}, c, folders[subject.name], facts)
        shown = folders[subjects[0].name]
        if len(subjects) > 1:
            shown = shown / "comparison"
            report(found, c, shown, {"runs": {subject.name: subject.step for subject in subjects}})
        print((shown / "table.md").read_text(encoding="utf-8"))
        print(f"results.json, table.md and plots are in {shown}")
    return 0


def cells(c: config.Evaluation) -> Iterator[Cell]:
    for task in c.tasks:
        for length in c.lengths:
            yield from (Cell(task, length, depth) for depth in (c.depths if task in DEEP else (None,)))


def folder_of(subject: Subject, c: config.Evaluation) -> Path:
    step = f"@{subject.step}" if "@" in subject.name else ""
    return subject.folder / "evaluations" / (c.name + step)


def _checked(subject: Subject, c: config.Evaluation, mesh: jax.sharding.Mesh) -> losses.Text | None:
    """The text of the losses, if any are asked for; ValueError for what would fail later, but for a lack of memory."""
    subject.check(c, mesh)
    for task in set(c.tasks) - set(LOSSES):
        check_tokenizer(task, subject.tokenizer)
        for length in c.lengths:
            retrieval.question(task, subject.tokenizer, length, 0.5, "")
    if not set(c.tasks) & set(LOSSES):
        return None
    data = subject.stage.data
    if c.path is None:
        sides = read(data, subject.folder)
        text = losses.Text(sides.validation, sides.kinds)
    else:
        text = losses.Text(*read_all(replace(data, path=c.path, mixture=None), subject.folder))
    if set(c.tasks) & set(LOSSES[:2]):
        text.windows(max(c.lengths), 1, 0)
    return text


def _evaluated(
    subject: Subject, c: config.Evaluation, mesh: jax.sharding.Mesh, text: losses.Text | None, screen: "Screen"
) -> list[Result]:
    """Its results, cell by cell; those that were there are not computed anew."""
    kept = Kept(folder_of(subject, c), c, subject, mesh, text)
    load = cache(lambda: subject.loaded(mesh))
    results = []
    with jax.set_mesh(mesh):
        for cell in cells(c):
            result = kept.find(cell)
            there = result is not None
            if result is None:
                result = kept.add(cell, asdict(cell) | _measured(load(), subject.tokenizer, c, cell, text))
            screen.done(f"{subject.name}: {in_words(result)}" + " (was there)" * there)
            results.append(result)
    return results


def _measured(score: Score, tokenizer: Tokenizer, c: config.Evaluation, cell: Cell, text: losses.Text | None) -> Result:
    if cell.task in LOSSES:
        assert text is not None
        return MEASURES[cell.task](score, tokenizer, c, text, cell.length)
    return retrieval.measure(score, tokenizer, c, cell.task, cell.length, cell.depth or 0.0)


class Kept:
    """cells.jsonl: a line a finished cell, with a key of all that it depends on; nothing in it is ever lost."""

    def __init__(
        self,
        folder: Path,
        c: config.Evaluation,
        subject: Subject,
        mesh: jax.sharding.Mesh,
        text: losses.Text | None,
    ):
        """Raises ValueError if the folder cannot be written."""
        self._path, self._lengths, self._found = folder / "cells.jsonl", c.lengths, {}
        self._common = [subject.weights, dict(mesh.shape), c.layout, c.strategy, c.samples, c.seed]
        self._text = text and text.fingerprint
        try:
            folder.mkdir(parents=True, exist_ok=True)
            content = self._path.read_bytes() if self._path.is_file() else b""
            whole = content[: content.rfind(b"\n") + 1]  # a start that was killed may have left half a line
            if jax.process_index() == 0:
                self._path.write_bytes(whole)
        except OSError as error:
            raise ValueError(f"cannot write to {folder} ({error.strerror}): check its permissions") from error
        try:
            for line in whole.decode().splitlines():
                row = json.loads(line)
                self._found[row["key"]] = row["result"]
        except (ValueError, LookupError, TypeError) as error:
            raise ValueError(
                f"{self._path} holds a damaged line ({error}): remove it, or use another --name"
            ) from error

    def _key(self, cell: Cell) -> str:
        text = [self._text, self._lengths if cell.task == "loss_by_context" else None] if cell.task in LOSSES else None
        whole = json.dumps([asdict(cell), self._common, text])
        return hashlib.sha256(whole.encode()).hexdigest()[:16]

    def find(self, cell: Cell) -> Result | None:
        return self._found.get(self._key(cell))

    def add(self, cell: Cell, result: Result) -> Result:
        if jax.process_index() == 0:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": self._key(cell), "result": result}) + "\n")
        return result


class Screen:
    """A live bar on a terminal, and a line a cell; only the first process speaks."""

    def __init__(self, cells: int):
        self._console = Console(quiet=jax.process_index() != 0, highlight=False, soft_wrap=True)
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("cells"), TimeRemainingColumn())
        self._live = Progress(*columns, console=self._console, disable=not self._console.is_terminal)
        self._task = self._live.add_task("", total=cells)
        self._cells, self._done = cells, 0

    def __enter__(self) -> "Screen":
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def done(self, text: str) -> None:
        self._done += 1
        self._console.print(f"{self._done}/{self._cells}  {text}", markup=False)
        self._live.update(self._task, completed=self._done)
