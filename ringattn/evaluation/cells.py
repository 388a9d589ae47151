"""Runs an evaluation cell by cell and stores each result as soon as it is computed."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

import jax
import numpy as np

from ringattn import config
from ringattn.config import LOSSES
from ringattn.data import (
    DEPTH_TASKS,
    Batch,
    ChatTemplate,
    check_fits,
    check_tokenizer,
    fingerprint,
    question,
    read,
    read_all,
)
from ringattn.evaluation import generated, losses, retrieval
from ringattn.evaluation.report import describe, write_report
from ringattn.evaluation.results import Result, ResultFile
from ringattn.evaluation.subject import LoadedModel, Subject, find_subjects
from ringattn.mesh.devices import start
from ringattn.mesh.processes import check_same
from ringattn.model.scoring import Scores
from ringattn.runs.directory import stored_fingerprints
from ringattn.runs.progress import Display
from ringattn.runs.shared import claimed

FORMAT = 2
"""Version of a cell's result. Increment it when the content of results changes, so that stored ones are not reused."""
MEASURES = dict(zip(LOSSES, (losses.by_position, losses.by_context, losses.by_kind), strict=True))


@dataclass(frozen=True)
class Cell:
    """A measurement: one task at one length, and one depth if the task has depths."""

    task: str
    length: int
    """Tokens per row."""
    depth: float | None


def evaluate(c: config.Evaluation) -> int:
    """Evaluates all runs and writes reports. Reuses the stored results of an interrupted evaluation.

    Returns the exit status of the process: 0, or 130 after Ctrl-C.

    Raises:
      ValueError: before any computation, if config, runs, text and devices are inconsistent, or if another process
        runs the same evaluation; later, if a file cannot be read or written.
    """
    subjects = find_subjects(c)
    directories = [output_directory(subject, c) for subject in subjects]
    with claimed(directories, c.mesh, "use another --name", "fix the cause and run the same command again"):
        return _evaluate_claimed(c, subjects)


def _evaluate_claimed(c: config.Evaluation, subjects: list[Subject]) -> int:
    """Evaluates into output directories that no other process uses. Returns the exit status of the process."""
    try:
        mesh = start(c.mesh)
        check_same("config", repr(c))
        texts = [_check(subject, subjects[0], c, mesh) for subject in subjects]
        runs: dict[str, list[Result]] = {subject.name: [] for subject in subjects}
        total, done = len(subjects) * len(list(cells(c))), 0
        with jax.set_mesh(mesh), Display(total, label="cells") as display:
            for subject, text in zip(subjects, texts, strict=True):
                for result, note in _results(subject, text, c, mesh, display):
                    runs[subject.name].append(result)
                    done += 1
                    display.print(f"{done}/{total}  {subject.name}: {describe(result)}{note}")
                    display.update(done)
    except KeyboardInterrupt:
        print("stopped: run the same command again to resume")
        return 130
    if jax.process_index() == 0:
        _write_reports(c, subjects, runs, _comparison_note(subjects, texts))
    return 0


def cells(c: config.Evaluation) -> Iterator[Cell]:
    for task in c.tasks:
        for length in c.lengths:
            yield from (Cell(task, length, depth) for depth in (c.depths if task in DEPTH_TASKS else (None,)))


def output_directory(subject: Subject, c: config.Evaluation) -> Path:
    step = f"@{subject.step}" if "@" in subject.name else ""
    return subject.directory / "evaluations" / (c.name + step)


def _write_reports(c: config.Evaluation, subjects: list[Subject], runs: dict[str, list[Result]], note: str) -> None:
    """Writes a report per run, and one that compares several runs; prints the table of the last one written."""
    directories = [output_directory(subject, c) for subject in subjects]
    for subject, directory in zip(subjects, directories, strict=True):
        facts = {"step": subject.step, "weights": subject.weights}
        write_report({subject.name: runs[subject.name]}, c, directory, facts)
    directory = directories[0]
    if len(subjects) > 1:
        directory = directory / "comparison"
        write_report(runs, c, directory, {"runs": {subject.name: subject.step for subject in subjects}, "note": note})
    print((directory / "table.md").read_text(encoding="utf-8"))
    print(f"results.json, table.md and plots are in {directory}")


def _comparison_note(subjects: list[Subject], texts: list[losses.Text | None]) -> str:
    """A warning if the runs' losses are not comparable, because texts or tokenizers differ; otherwise empty."""
    if len({text.fingerprint for text in texts if text is not None}) < 2:
        return ""
    if len({subject.tokenizer.fingerprint for subject in subjects}) > 1:
        return "The runs have different tokenizers; compare bits per byte, not nats per token."
    return "Each run was scored on its own held-out text, so losses are not comparable; choose one text with --path."


def _check(subject: Subject, first: Subject, c: config.Evaluation, mesh: jax.sharding.Mesh) -> losses.Text | None:
    """Returns the text of the loss tasks, or None if none. `first` is the first subject.

    Raises ValueError for every error that would otherwise stop the evaluation later, except running out of memory.
    """
    subject.check(c, mesh)
    check_same("checkpoint", subject.weights)
    chat = _chat_template(subject, c)
    if chat is not None:
        chat.check(subject.tokenizer)
    for task in set(c.tasks) - set(LOSSES):
        check_tokenizer(task, subject.tokenizer)
        for length in c.lengths:
            check_fits(task, subject.tokenizer, length, retrieval.sample_seeds(c), chat)
    if not set(c.tasks) & set(LOSSES):
        return None
    text = _read_text(subject, first, c)
    check_same("text", text.fingerprint)
    if set(c.tasks) & set(LOSSES[:2]):
        text.windows(max(c.lengths), 1, 0)
    return text


def _chat_template(subject: Subject, c: config.Evaluation) -> ChatTemplate | None:
    """Returns the chat template, or None without `c.chat`. Raises ValueError if the checkpoint has none."""
    if not c.chat:
        return None
    template = subject.origin.chat_template
    if template is None:
        rule = "requires a checkpoint with a chat_template.jinja, or a chat_template in its tokenizer_config.json"
        raise ValueError(f"chat=True {rule}, but {subject.name} has none; use --chat False")
    return template


def _read_text(subject: Subject, first: Subject, c: config.Evaluation) -> losses.Text:
    """Returns the text at `c.path`, or the run's held-out text. Raises ValueError if the latter has changed.

    `model.weights` has no held-out text. It is compared with runs on the text that the `first` one held out.
    """
    if c.path is not None:
        return losses.Text(*read_all(replace(subject.stage.data, path=c.path, mixture=None), subject.tokenizer))
    fix = "choose a text for the losses with --path"
    if subject.step is None and first.step is None:
        raise ValueError(f"{subject.name} has no held-out text; {fix}")
    if subject.step is None and subject.tokenizer.fingerprint != first.tokenizer.fingerprint:
        problem = f"{subject.name} has another tokenizer than {first.name}, so it has no held-out text"
        raise ValueError(f"{problem}; {fix}")
    subject = first if subject.step is None else subject
    data = subject.stage.data
    splits, stored = read(data, tokenizer=subject.tokenizer), stored_fingerprints(subject.directory)
    fingerprints = {
        name: fingerprint([corpus.fingerprint for corpus in corpora], data.mixture)
        for name, corpora in (("training", splits.training), ("validation", splits.validation))
    }
    if stored not in (None, fingerprints):
        fix = "restore it, or choose other text with --path"
        raise ValueError(f"the text of data.path={data.path!r} has changed since {subject.name} was trained; {fix}")
    return losses.Text(splits.validation, splits.kinds)


def _results(
    subject: Subject, text: losses.Text | None, c: config.Evaluation, mesh: jax.sharding.Mesh, display: Display
) -> Iterator[tuple[Result, str]]:
    """Yields each cell's result, computed or stored, and a note for the display. Loads the model only if needed."""
    stored = ResultFile(output_directory(subject, c) / "cells.jsonl")
    check_same("list of finished cells", repr(sorted(stored.results)))
    load, compiled = cache(lambda: subject.load(c, mesh)), set[tuple[int, bool]]()
    for cell in cells(c):
        key = _cell_key(cell, subject, text, c, mesh)
        result = stored.results.get(key)
        if result is not None:
            yield result, " (stored)"
            continue
        model, name = load(), f"{subject.name}: {cell.task}, {cell.length:,} tokens"
        program = cell.length, cell.task == "loss_by_kind"  # whose rows alone have segment ids
        with display.subtask(name, c.samples, compiles=program not in compiled) as advance:
            result = asdict(cell) | _measure(_counted(model, advance), subject, c, cell, text)
        compiled.add(program)
        stored.add(key, result)
        yield result, ""


def _cell_key(
    cell: Cell, subject: Subject, text: losses.Text | None, c: config.Evaluation, mesh: jax.sharding.Mesh
) -> str:
    """Returns a digest of everything that the result of a cell depends on."""
    stage = subject.stage
    content = [
        asdict(cell),
        subject.weights,
        asdict(stage.model),
        subject.tokenizer.fingerprint,
    ]
    content += [dict(mesh.shape), c.layout, c.strategy, c.samples, c.seed, FORMAT]
    if cell.task in LOSSES:
        assert text is not None
        content += [text.fingerprint, losses.MAX_RANGES, c.lengths if cell.task == "loss_by_context" else None]
    else:  # the tokens of one sample change with the haystack (the Python version) and with the wording of the task
        seed, chat = retrieval.sample_seeds(c)[0], _chat_template(subject, c)
        sample = question(cell.task, subject.tokenizer, cell.length, cell.depth or 0.0, seed, chat)
        content.append(sample.tokens.tolist())
        if c.scoring == "generation":
            content.append([c.scoring, generated.answer_tokens(cell.task, subject.tokenizer)])
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def _measure(
    model: LoadedModel, subject: Subject, c: config.Evaluation, cell: Cell, text: losses.Text | None
) -> Result:
    if cell.task in LOSSES:
        assert text is not None
        return MEASURES[cell.task](model.score, c, text, cell.length)
    chat = _chat_template(subject, c)
    row = subject.tokenizer, c, cell.task, cell.length, cell.depth or 0.0, chat
    if c.scoring == "generation":
        return generated.measure(model.generate, *row)
    return retrieval.measure(model.score, *row)


def _counted(model: LoadedModel, advance: Callable[[int], None]) -> LoadedModel:
    """Makes the functions of `model` also call `advance` with the number of rows in each batch."""

    def score(batches: Iterable[Batch]) -> Iterator[Scores]:
        for scores in model.score(batches):
            advance(len(scores.nats))
            yield scores

    def generate(prompts: list[np.ndarray], max_tokens: int, stop: Sequence[str]) -> list[str]:
        answers = model.generate(prompts, max_tokens, stop)
        advance(len(answers))
        return answers

    return LoadedModel(score, generate)
