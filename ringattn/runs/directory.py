"""Writes the description of a run to its directory, and checks that a config can resume it."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax

from ringattn import config
from ringattn.environment import environment
from ringattn.runs.checkpoint import saved_steps
from ringattn.runs.files import expanded, read_small, write_bytes, write_text, writing
from ringattn.units import first_line

FIXED = ("model.", "data.", "train.batch_size", "train.seed")
"""Prefixes of the fields that a resumed run must not change: they define the loss and the order of the data."""

FREE = ("model.dtype", "model.remat", "model.head_groups")
"""Exceptions from FIXED: they change how the loss is computed, not its definition."""


class SavedCheckpoint(NamedTuple):
    """A checkpoint of a run."""

    directory: Path
    """The run directory."""
    run: config.Config
    step: int
    is_explicit: bool
    """True if the path specified the step."""

    def stage(self) -> tuple[config.Config, int]:
        """Returns the config of the checkpoint's stage, and the number of tokens that the model was trained for.

        It is the length of the longest rows up to that stage, also of those before `model.weights`.
        """
        number = self.run.stage_after(self.step - 1)
        stage = self.run.stage(number)
        earlier = stage.model.rope_original if stage.model.weights is not None else 0
        return stage, max(earlier, *(self.run.stage(n).data.seq_len for n in range(1, number + 1)))


def locate(path: Path) -> tuple[Path, bool]:
    """Returns the directory of the run that `path` names, and True if `path` names one of its checkpoints."""
    is_step = path.name.isdecimal() and path.parent.name == "checkpoints"
    return (path.parent.parent if is_step else path.parent if path.name == "checkpoints" else path), is_step


def find_checkpoint(path: str | Path, name: str) -> SavedCheckpoint:
    """Returns the checkpoint at `path`, or the newest one of the run directory `path`.

    Raises ValueError, with a fix, if it does not exist. `name` is the option that gives the path.
    """
    given = expanded(path)
    directory, is_step = locate(given)
    if not (directory / "config.json").is_file():
        found = sorted(file.parent for file in directory.parent.glob("*/config.json"))
        runs = [str(run) for run in found if saved_steps(run / "checkpoints")]
        fix = f"use one of {', '.join(runs)}" if runs else "train one with scripts/train.py"
        raise ValueError(f"{name}: {directory} is not a run directory: config.json is missing; {fix}")
    run = config.load(directory / "config.json")
    steps = saved_steps(directory / "checkpoints")
    if not steps:
        fix = f"train it with python scripts/train.py --config {directory}/config.json"
        raise ValueError(f"{name}: {directory} has no checkpoint; {fix}")
    step = int(given.name) if is_step else steps[0]
    if step not in steps:
        raise ValueError(f"{name}: {directory} has no checkpoint {step}; use one of {', '.join(map(str, steps))}")
    return SavedCheckpoint(directory, run, step, is_step)


def write_description(directory: Path, c: config.Config, fingerprints: dict[str, str], files: dict[str, bytes]) -> None:
    """Writes config.json, environment.json, data.json and `files`, contents by name, from process 0 only.

    Raises ValueError if the directory cannot be written.
    """
    if jax.process_index() > 0:
        return
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
        # `resume` and `profile` belong to one launch, not to the run.
        write_text(directory / "config.json", config.to_json(replace(c, resume="auto", profile=None)))
        for name, content in {"environment.json": environment(), "data.json": fingerprints}.items():
            write_text(directory / name, json.dumps(content, indent=2) + "\n")
        for name, content in files.items():
            write_bytes(directory / name, content)


def check_data(directory: Path, fingerprints: dict[str, str], path: str | tuple[str, ...]) -> list[str]:
    """Returns a note if data.json of the run in `directory` is missing; `path` is data.path for messages.

    Raises ValueError if the run was trained on other data, or if data.json is damaged.
    """
    stored = stored_fingerprints(directory)
    if stored is None:
        return [f"{directory / 'data.json'} is missing: resuming without a check that the data are unchanged"]
    if stored != fingerprints:
        fix = "restore the data, or start a new run with another --name"
        raise ValueError(f"data.path={path!r} has changed since the run in {directory} was trained on it; {fix}")
    return []


def stored_fingerprints(directory: Path) -> dict[str, str] | None:
    """Returns the fingerprints in data.json of the run in `directory`; None if the file is missing.

    Raises ValueError if the file is damaged.
    """
    file = directory / "data.json"
    if not file.is_file():
        return None
    try:
        stored = json.loads(read_small(file))
        if not isinstance(stored, dict):
            raise ValueError("not a JSON object")
    except (OSError, ValueError, RecursionError) as error:
        fix = "restore it, or remove it to continue without a check that the data are unchanged"
        raise ValueError(f"{file} cannot be read ({first_line(error)}); {fix}") from None
    return stored


def check_resumable(c: config.Config, directory: Path) -> None:
    """Raises ValueError if `c.resume` does not allow resuming, or if `c` changes a field that must not change.

    Stages that have not started may be changed, added or removed.
    """
    steps = saved_steps(directory / "checkpoints")
    if not steps:
        if c.resume == "must":
            raise ValueError(f"resume='must', but {directory} has no checkpoint; use --resume auto, or another --name")
        return
    if c.resume == "never":
        fix = "use another --name, or resume with --resume auto"
        raise ValueError(f"resume='never', but {directory} has a checkpoint of step {steps[0]}; {fix}")
    previous = _previous_config(directory)
    current = previous.stage_after(steps[0] - 1)  # the stage of the last update
    if current > len(c.stages):
        fix = "restore the missing stages, or start a new run with another --name"
        raise ValueError(
            f"stages: the config has {len(c.stages)}, but the run in {directory} is in stage {current}; {fix}"
        )
    for stage in range(1, current + 1):
        _check_fixed(previous, c, stage, directory, finished=stage < current)
    _check_steps(previous, c, current, steps[0], directory)


def _previous_config(directory: Path) -> config.Config:
    """Returns the config of the run in `directory`. Raises ValueError if it cannot be read."""
    path = directory / "config.json"
    fix = "restore it, or copy the one that the same command writes with another --name"
    if not path.is_file():
        raise ValueError(f"{path} is missing, so the run cannot be compared with this config; {fix}")
    try:
        return config.load(path)
    except ValueError as error:
        raise ValueError(f"{error}; {fix}") from None


def _check_fixed(previous: config.Config, c: config.Config, stage: int, directory: Path, finished: bool) -> None:
    """Raises ValueError if `c` changes a fixed field of `stage`, which has started."""
    old, new = _fields(previous.stage(stage)), _fields(c.stage(stage))
    # The steps of a finished stage determine where the data and schedule of the next stage start.
    fixed = (*FIXED, "train.steps") if finished else FIXED
    changed = [name for name in new if name.startswith(fixed) and name not in FREE and old[name] != new[name]]
    if changed:
        name = changed[0]
        flags = {config.flag(each.stages, stage, name) for each in (previous, c)}
        flag = (flags - {name} or flags).pop()  # the stage's field, if either config overrides it there
        fix = f"use --{flag} {config.as_option(old[name])}, or start a new run with another --name"
        raise ValueError(f"{flag}={new[name]!r}, but the run in {directory} has {old[name]!r}; {fix}")


def _check_steps(previous: config.Config, c: config.Config, stage: int, step: int, directory: Path) -> None:
    """Raises ValueError if `stage`, the current stage, has fewer steps than checkpoint `step` has completed."""
    done, steps = step - previous.steps_before(stage), c.stage(stage).train.steps
    if steps < done and len(c.stages) > 1:  # a run with a single stage is complete, which is not an error
        flag = config.flag(c.stages, stage, "train.steps")
        fix = f"use --{flag} {done} or more, or start a new run with another --name"
        raise ValueError(f"{flag}={steps}, but the run in {directory} has done {done} steps of stage {stage}; {fix}")


def _fields(c: config.Config) -> dict[str, Any]:
    sections = {name: value for name, value in asdict(c).items() if isinstance(value, dict)}
    return {f"{section}.{name}": value for section, values in sections.items() for name, value in values.items()}
