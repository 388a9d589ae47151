"""Reads the arrays of checkpoints and verifies them, on any mesh and in several processes."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp

from ringattn.mesh.processes import gather
from ringattn.runs import orbax_messages
from ringattn.runs.verification import (
    Arrays,
    Facts,
    check_arrays,
    check_facts,
    difference,
    is_damage,
    named,
    reason,
    shapes,
)

Tree = TypeVar("Tree")
orbax_messages.silence()


def read_params(directory: Path, step: int, like: Tree) -> Tree:
    """Returns the parameters of checkpoint `step` in `directory`, with the shardings of `like`. Writes nothing.

    Raises ValueError if the checkpoint is damaged, does not match `like`, or cannot be read.
    """
    target = {f"params.{name}": leaf for name, leaf in named(like).items()}
    with _read_errors(directory / str(step)):
        arrays = read_arrays(directory / str(step), target, "params.")
        return jax.tree.unflatten(jax.tree.structure(like), list(arrays.values()))


def params_digest(directory: Path, step: int) -> str:
    """Returns a hexadecimal digest of the parameters of checkpoint `step`. Raises ValueError if it cannot be read."""
    with _read_errors(directory / str(step)):
        sums = _read_facts(directory / str(step))["sums"]
    sums = {name: value for name, value in sums.items() if name.startswith("params.")}
    return hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()[:16]


class MismatchError(ValueError):
    """Raised if the arrays of an intact checkpoint do not match the model."""


@contextmanager
def _read_errors(checkpoint: Path) -> Iterator[None]:
    """Converts read errors to ValueError with a fix."""
    try:
        yield
    except MismatchError as error:
        raise ValueError(f"{checkpoint} does not match: {error}") from None
    except Exception as error:  # reading a damaged file can raise any exception
        if not is_damage(error):
            raise unreadable(checkpoint, error) from error
        raise ValueError(f"{checkpoint} is damaged ({reason(error)}); use another checkpoint") from error


def unreadable(checkpoint: Path, error: Exception) -> ValueError:
    fix = "but may be intact; nothing was changed; fix the cause and run the same command again"
    return ValueError(f"{checkpoint} cannot be read ({reason(error)}), {fix}")


def read_arrays(checkpoint: Path, target: Arrays, prefix: str) -> dict[str, jax.Array]:
    """Reads the arrays named in `target`: those of the checkpoint whose names start with `prefix`.

    Raises MismatchError unless they have the same names and shapes. An error in one of several processes is raised in
    all of them.
    """
    arrays, sums, error = {}, {}, None
    try:
        stored = _read_facts(checkpoint)
        if {name: shape for name, shape in stored["shapes"].items() if name.startswith(prefix)} != shapes(target):
            raise MismatchError(difference(stored, target))
        arrays, sums = _read_arrays(checkpoint, target), stored["sums"]
    except Exception as raised:  # reading a damaged file can raise any exception
        error = raised
    problems = gather("" if error is None else f"{is_damage(error):d}{reason(error)}")
    if error is not None:
        raise error
    for process, problem in enumerate(problems):
        if problem:
            raise (ValueError if problem[0] == "1" else TimeoutError)(f"in process {process}: {problem[1:]}")
    check_arrays(arrays, sums)
    return arrays


def _read_facts(checkpoint: Path) -> Facts:
    stored = json.loads((checkpoint / "facts" / "metadata").read_bytes())
    check_facts(stored)
    return stored


def _read_arrays(checkpoint: Path, target: Arrays) -> dict[str, jax.Array]:
    """Reads the arrays named in `target`, a subset of the checkpoint, without communication between processes."""
    restore_args = ocp.checkpoint_utils.construct_restore_args(target)
    args = ocp.args.PyTreeRestore(target, restore_args=restore_args, partial_restore=True)
    state: Any = checkpoint.absolute() / "state"
    arrays = ocp.PyTreeCheckpointHandler().restore(state, args=args)
    return {name: arrays[name] for name in target}
