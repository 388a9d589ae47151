"""A run's folder: what says what the run is, whether it may go on, and its newest checkpoint."""

import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jax

from ringattn import config
from ringattn.environment import environment
from ringattn.mesh import abstract
from ringattn.training.checkpoint import Checkpoints, saved_steps
from ringattn.training.run import Run
from ringattn.training.step import TrainState

FIXED = ("model.", "data.", "attention.window", "train.batch_size", "train.seed")
"""Fields (by prefix) that a run keeps for life: they say what its numbers mean, and which row comes next."""

FREE = ("model.dtype", "model.remat")
"""But for these, which say how it is computed."""


def describe_to(folder: Path, c: config.Config, run: Run) -> None:
    """Writes what the run is and what it runs on, so that it can be repeated and gone on with."""
    if jax.process_index() > 0:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Whether it resumes and what is traced are said of a start, not of the run.
        config.save(replace(c, resume="auto", profile=None), folder / "config.json")
        files = {"environment.json": environment(), "data.json": run.fingerprints()}
        written = {name: (json.dumps(content, indent=2) + "\n").encode() for name, content in files.items()}
        for name, content in (written | run.tokenizer.files).items():
            unfinished = folder / f".{name}.{os.getpid()}"  # a start that is cut off leaves what was there
            unfinished.write_bytes(content)
            os.replace(unfinished, folder / name)
    except OSError as error:
        raise ValueError(f"cannot write to {folder} ({error.strerror}): choose another --log.directory") from None


def check_resumable(c: config.Config, folder: Path) -> None:
    """Raises ValueError if `c` does not allow what is there: a checkpoint, or none, or one of another run.

    Stages that lie ahead may be others than they were, and more or fewer.
    """
    found = saved_steps(folder / "checkpoints")
    if not found:
        if c.resume == "must":
            raise ValueError(f"resume='must', but {folder} has no checkpoint: use --resume auto, or name its --name")
        return
    if c.resume == "never":
        cure = "choose another --name, or go on from it with --resume auto"
        raise ValueError(f"resume='never', but {folder} has a checkpoint of step {found[0]}: {cure}")
    path = folder / "config.json"
    if path.is_file():
        before = config.load(path)
        there = before.stage_after(found[0] - 1)  # the stage of the last update
        if there > len(c.stages):
            cure = "put back those that it has, or start anew under another --name"
            raise ValueError(f"stages: there are {len(c.stages)}, but the run in {folder} is in stage {there}: {cure}")
        for number in range(1, there + 1):
            _check_kept(before, c, number, folder, done=number < there)
        _check_length(before, c, there, found[0], folder)


def _check_kept(before: config.Config, c: config.Config, number: int, folder: Path, done: bool) -> None:
    """Raises ValueError if stage `number`, which the run has at least begun, is no longer what it was."""
    old, new = _fields(before.stage(number)), _fields(c.stage(number))
    kept = (*FIXED, "train.steps") if done else FIXED  # its steps say where the next stage's rows begin
    changed = [name for name in new if name.startswith(kept) and name not in FREE and old[name] != new[name]]
    if changed:
        name = changed[0]
        flags = {config.flag(each.stages, number, name) for each in (before, c)}
        flag = (flags - {name} or flags).pop()  # the stage's own value, if it has one or had
        cure = f"use --{flag} {_in_words(old[name])}, or start anew under another --name"
        raise ValueError(f"{flag}={new[name]!r}, but the run in {folder} has {old[name]!r}: {cure}")


def _in_words(value: Any) -> str:
    """As it is written on a command line."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _check_length(before: config.Config, c: config.Config, number: int, step: int, folder: Path) -> None:
    """Raises ValueError if stage `number`, the last that is begun, ends before `step`, the newest checkpoint's."""
    done, steps = step - before.steps_before(number), c.stage(number).train.steps
    if steps < done and len(c.stages) > 1:  # a single one simply has nothing to do
        flag = config.flag(c.stages, number, "train.steps")
        cure = f"use --{flag} {done} or more, or start anew under another --name"
        raise ValueError(f"{flag}={steps}, but the run in {folder} has done {done} of stage {number}: {cure}")


def _fields(c: config.Config) -> dict[str, Any]:
    sections = {name: value for name, value in asdict(c).items() if isinstance(value, dict)}
    return {f"{section}.{name}": value for section, values in sections.items() for name, value in values.items()}


def restore(run: Run, folder: Path) -> tuple[TrainState, list[str]]:
    """The newest good checkpoint's state on the run's mesh, and a line about each damaged one.

    Raises ValueError if the text is not what the run was trained on.
    """
    path = folder / "data.json"
    if path.is_file() and json.loads(path.read_text(encoding="utf-8")) != run.fingerprints():
        cure = "put the text back as it was, or start anew under another --name"
        raise ValueError(f"the text of {run.config.data.path!r} is not what the run in {folder} was trained on: {cure}")

    with Checkpoints(folder / "checkpoints", run.config.checkpoint.keep) as checkpoints:
        return checkpoints.restore(abstract(jax.eval_shape(run.initial_state), run.mesh))
