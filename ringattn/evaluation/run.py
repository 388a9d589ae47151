"""An evaluation from its config to the folders of the runs: cell by cell, each kept as soon as it is done."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

import jax

from ringattn import config
from ringattn.config import LOSSES
from ringattn.data import DEEP, Tokenizer, check_room, check_tokenizer, fingerprint, question, read, read_all
from ringattn.evaluation import losses, retrieval
from ringattn.evaluation.kept import Kept, Result, Screen
from ringattn.evaluation.report import in_words, report
from ringattn.evaluation.scoring import Score
from ringattn.evaluation.subject import Subject, find
from ringattn.mesh import check_same, start

FORMAT = 1
"""Of a cell's result; another for other content, so that what was kept before is found anew."""
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
    and devices do not fit each other, before anything is computed, or where something cannot be read or written.
    """
    subjects = [find(path, c) for path in c.runs]
    if len({subject.name for subject in subjects}) < len(subjects):
        raise ValueError(f"runs={c.runs}: two of them are of one name: evaluate them one after another")
    try:
        mesh = start(c.mesh)
        check_same("config", repr(c))
        texts = [_checked(subject, c, mesh) for subject in subjects]
        with Screen(len(subjects) * len(list(cells(c)))) as screen:
            found = [_evaluated(*each, c, mesh, screen) for each in zip(subjects, texts, strict=True)]
    except KeyboardInterrupt:
        print("stopped: the same command goes on from here")
        return 130
    if jax.process_index() == 0:
        _tell(c, subjects, found, _own_texts(subjects, texts))
    return 0


def _tell(c: config.Evaluation, subjects: list[Subject], found: list[list[Result]], note: str) -> None:
    folders = [folder_of(subject, c) for subject in subjects]
    for subject, results, folder in zip(subjects, found, folders, strict=True):
        report({subject.name: results}, c, folder, {"step": subject.step, "weights": subject.weights})
    shown = folders[0]
    if len(subjects) > 1:
        shown = shown / "comparison"
        runs = {subject.name: results for subject, results in zip(subjects, found, strict=True)}
        report(runs, c, shown, {"runs": {subject.name: subject.step for subject in subjects}, "note": note})
    print((shown / "table.md").read_text(encoding="utf-8"))
    print(f"results.json, table.md and plots are in {shown}")


def _own_texts(subjects: list[Subject], texts: list[losses.Text | None]) -> str:
    """A warning for those who compare losses of different texts, or of different tokens; empty if there is no need."""
    if len({text.fingerprint for text in texts if text is not None}) < 2:
        return ""
    if len({subject.tokenizer.fingerprint for subject in subjects}) > 1:
        return "The runs have tokenizers of their own: compare bits per byte, not nats per token."
    return "Each run was scored on its own held-out text, so their losses do not compare: name one text by --path."


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
    check_same("checkpoint", subject.weights)
    for task in set(c.tasks) - set(LOSSES):
        check_tokenizer(task, subject.tokenizer)
        for length in c.lengths:
            check_room(task, subject.tokenizer, length, retrieval.seeds(c))
    if not set(c.tasks) & set(LOSSES):
        return None
    text = _text(subject, c)
    check_same("text", text.fingerprint)
    if set(c.tasks) & set(LOSSES[:2]):
        text.windows(max(c.lengths), 1, 0)
    return text


def _text(subject: Subject, c: config.Evaluation) -> losses.Text:
    """What the run held out, or what `c` names. Raises ValueError if the run's text is no longer what it was."""
    data = subject.stage.data
    if c.path is not None:
        return losses.Text(*read_all(replace(data, path=c.path, mixture=None), subject.folder))
    sides, there = read(data, subject.folder), subject.folder / "data.json"
    now = {
        name: fingerprint([corpus.fingerprint for corpus in corpora], data.mixture)
        for name, corpora in (("training", sides.training), ("validation", sides.validation))
    }
    if there.is_file() and json.loads(there.read_text(encoding="utf-8")) != now:
        cure = "put it back as it was, or name other text by --path"
        raise ValueError(f"the text of {data.path!r} is not what {subject.name} was trained on: {cure}")
    return losses.Text(sides.validation, sides.kinds)


def _evaluated(
    subject: Subject, text: losses.Text | None, c: config.Evaluation, mesh: jax.sharding.Mesh, screen: Screen
) -> list[Result]:
    """Its results, cell by cell; those that were there are not computed anew."""
    kept = Kept(folder_of(subject, c) / "cells.jsonl")
    check_same("list of finished cells", repr(sorted(kept.results)))
    load, results = cache(lambda: subject.loaded(mesh)), []
    with jax.set_mesh(mesh):
        for cell in cells(c):
            key = _key(cell, subject, text, c, mesh)
            result = kept.results.get(key)
            there = result is not None
            if result is None:
                with screen.cell(f"{subject.name}: {cell.task}, {cell.length:,} tokens", c.samples) as counted:
                    result = asdict(cell) | _measured(counted(load()), subject.tokenizer, c, cell, text)
                kept.add(key, result)
            screen.done(f"{subject.name}: {in_words(result)}" + " (was there)" * there)
            results.append(result)
    return results


def _key(cell: Cell, subject: Subject, text: losses.Text | None, c: config.Evaluation, mesh: jax.sharding.Mesh) -> str:
    """What stands for all that a cell's result depends on."""
    stage = subject.stage
    common = [asdict(cell), subject.weights, asdict(stage.model), stage.attention.window, subject.tokenizer.fingerprint]
    common += [dict(mesh.shape), c.layout, c.strategy, c.samples, c.seed, FORMAT]
    if cell.task in LOSSES:
        assert text is not None
        common += [text.fingerprint, c.lengths if cell.task == "loss_by_context" else None]
    else:  # stands for the haystack, which other versions of Python have, and for the task's wording
        row = question(cell.task, subject.tokenizer, cell.length, cell.depth or 0.0, retrieval.seeds(c)[0])
        common.append(row.tokens.tolist())
    return hashlib.sha256(json.dumps(common).encode()).hexdigest()[:16]


def _measured(score: Score, tokenizer: Tokenizer, c: config.Evaluation, cell: Cell, text: losses.Text | None) -> Result:
    if cell.task in LOSSES:
        assert text is not None
        return MEASURES[cell.task](score, tokenizer, c, text, cell.length)
    return retrieval.measure(score, tokenizer, c, cell.task, cell.length, cell.depth or 0.0)
