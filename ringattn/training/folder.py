"""A run's folder: what says what the run is, whether it may go on, and its newest checkpoint."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jax
from jax import P

from ringattn import config
from ringattn.environment import environment
from ringattn.training.checkpoint import Checkpoints, saved_steps
from ringattn.training.run import Run
from ringattn.training.step import TrainState

FIXED = ("model.", "data.", "attention.window", "train.batch_size", "train.seed")
"""Fields (by prefix) that a run keeps for life: they say what its numbers mean, and which row comes next."""


def describe_to(folder: Path, run: Run) -> None:
    """Writes what the run is and what it runs on, so that it can be repeated and gone on with."""
    if jax.process_index() > 0:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Whether it resumes is said of a start, not of the run.
        config.save(replace(run.config, resume="auto"), folder / "config.json")
        files = {"environment.json": environment(), "data.json": run.fingerprints()}
        for name, content in files.items():
            (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        for name, content in run.tokenizer.files.items():
            (folder / name).write_bytes(content)
    except OSError as error:
        raise ValueError(f"cannot write to {folder} ({error.strerror}): choose another --log.directory") from None


def check_resumable(c: config.Config, folder: Path) -> bool:
    """Whether the run in `folder` has a checkpoint to go on from; ValueError if `c` does not allow what is there."""
    found = saved_steps(folder / "checkpoints")
    if not found:
        if c.resume == "must":
            raise ValueError(f"resume='must', but {folder} has no checkpoint: use --resume auto, or name its --name")
        return False
    if c.resume == "never":
        cure = "choose another --name, or go on from it with --resume auto"
        raise ValueError(f"resume='never', but {folder} has a checkpoint of step {found[0]}: {cure}")
    path = folder / "config.json"
    if path.is_file():
        before, now = _fields(config.load(path)), _fields(c)
        changed = [
            name for name in now if name.startswith(FIXED) and name != "model.dtype" and before[name] != now[name]
        ]
        if changed:
            name = changed[0]
            cure = f"use --{name} {before[name]}, or start anew under another --name"
            raise ValueError(f"{name}={now[name]!r}, but the run in {folder} has {before[name]!r}: {cure}")
    return True


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

    def placed(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        spec = P() if leaf.sharding is None else leaf.sharding.spec
        sharding = jax.NamedSharding(run.mesh, spec)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    with Checkpoints(folder / "checkpoints", run.config.checkpoint.keep) as checkpoints:
        return checkpoints.restore(jax.tree.map(placed, jax.eval_shape(run.initial_state)))
