"""Checkpoints of a run: written behind the run's back, and checked when read, on whatever mesh.

Orbax writes a checkpoint under another name and renames it when all is there, so a process killed while it writes
does no harm. It does not notice a byte that the disk has changed: each array's sum is kept beside it.
"""

import hashlib
import json
import os
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from ringattn.model import Params
from ringattn.training.step import TrainState


def saved_steps(folder: Path) -> list[int]:
    """The steps of the finished checkpoints in `folder`, the newest first; none if there is no such folder."""
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    return sorted((int(name) for name in names if name.isdecimal()), reverse=True)


class Checkpoints:
    """Writes and reads `folder`/<step>/, keeping the newest `keep`; leaving the context awaits the last write."""

    def __init__(self, folder: Path, keep: int):
        self._folder = folder.absolute()
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(self._folder, options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._manager.close()

    def save(self, state: TrainState) -> None:
        """Begins to write `state`, which may be donated at once. Raises what made the write before it fail.

        Raises ValueError, and writes nothing, if `state` is no longer finite: no run could go on from it.
        """
        step, arrays = int(state.step), _named(state)
        broken = [name for name, finite in jax.device_get(_finite(arrays)).items() if not finite]
        if broken:
            cure = "lower --optimizer.learning_rate and start anew under another --name"
            raise ValueError(f"{broken[0]} is not finite after step {step}, which is not saved: {cure}")
        facts = {"shapes": _shapes(arrays), "sums": _sums(arrays)}
        args = ocp.args.Composite(state=ocp.args.StandardSave(arrays), facts=ocp.args.JsonSave(facts))
        self._manager.save(step, args=args, force=True)

    def restore(self, like: TrainState) -> tuple[TrainState, list[str]]:
        """The newest undamaged state, and a line about each damaged one that was passed over.

        `like` is abstract and says by its shardings how the arrays are to lie. What is passed over is renamed to
        `damaged-<step>`, so that the run may write that step again. Raises ValueError if the newest checkpoint is
        of another model, or if none can be read.
        """
        damaged: dict[int, str] = {}
        target = _named(like)
        for step in saved_steps(self._folder):
            try:
                facts = self._manager.restore(step, args=ocp.args.Composite(facts=ocp.args.JsonRestore()))["facts"]
                arrays = self._read(step, target, facts["sums"]) if facts["shapes"] == _shapes(target) else None
            except (MemoryError, PermissionError):  # not the file's fault
                raise
            except Exception as error:  # whatever a damaged file makes its reader raise
                damaged[step] = f"checkpoint {step} is damaged, going back: {first_line(error)}"
                continue
            if arrays is None:
                raise ValueError(f"{self._folder / str(step)} is of another model: {_difference(facts, target)}")
            self._set_aside(list(damaged))
            return jax.tree.unflatten(jax.tree.structure(like), list(arrays.values())), list(damaged.values())
        reasons = "; ".join(damaged.values())
        raise ValueError(f"no readable checkpoint in {self._folder} ({reasons}): start anew under another --name")

    def _read(self, step: int, target: dict[str, Any], sums: dict[str, int]) -> dict[str, jax.Array]:
        arrays = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(target)))["state"]
        arrays = {name: arrays[name] for name in target}
        _check_sums(arrays, sums)
        return arrays

    def _set_aside(self, steps: list[int]) -> None:
        if jax.process_index() == 0:
            for step in steps:
                names = (f"damaged-{step}" + f"-{again}" * bool(again) for again in count())
                free = next(name for name in names if not (self._folder / name).exists())
                os.replace(self._folder / str(step), self._folder / free)
        self._manager.reload()


def read_params(folder: Path, step: int, like: Params) -> Params:
    """The parameters alone of checkpoint `step` in `folder`, which is only read, as they are to lie by `like`.

    Raises ValueError if the checkpoint is damaged or of another model.
    """
    names = {f"params.{name}": leaf for name, leaf in _named(like).items()}
    try:
        facts = json.loads((folder / str(step) / "facts" / "metadata").read_text(encoding="utf-8"))
        there = {name: shape for name, shape in facts["shapes"].items() if name.startswith("params.")}
        if there == _shapes(names):
            args = ocp.args.PyTreeRestore(
                names, restore_args=ocp.checkpoint_utils.construct_restore_args(names), partial_restore=True
            )
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
                arrays = reader.restore(folder.absolute() / str(step) / "state", args=args)
            _check_sums(arrays, facts["sums"])
            return jax.tree.unflatten(jax.tree.structure(like), [arrays[name] for name in names])
    except (MemoryError, PermissionError):  # not the file's fault
        raise
    except Exception as error:  # whatever a damaged file makes its reader raise
        raise ValueError(f"{folder / str(step)} is damaged ({first_line(error)}): name another checkpoint") from error
    raise ValueError(f"{folder / str(step)} is of another model: {_difference(facts, names)}")


def params_digest(folder: Path, step: int) -> str:
    """Hexadecimal digits that change with any parameter of checkpoint `step` in `folder`; ValueError if unreadable."""
    try:
        facts = json.loads((folder / str(step) / "facts" / "metadata").read_text(encoding="utf-8"))
        sums = {name: value for name, value in facts["sums"].items() if name.startswith("params.")}
    except (OSError, ValueError, LookupError) as error:
        raise ValueError(f"{folder / str(step)} is damaged ({first_line(error)}): name another checkpoint") from error
    return hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()[:16]


def _check_sums(arrays: dict[str, jax.Array], sums: dict[str, int]) -> None:
    changed = [name for name, sum_ in _sums(arrays).items() if sum_ != sums[name]]
    if changed:
        raise ValueError(f"{changed[0]} is not what was written")


def _named(state: Any) -> dict[str, Any]:
    """The leaves in the order of the tree, each under its path, such as 'params.layers.0.attention.key.value'."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _shapes(arrays: dict[str, Any]) -> dict[str, list[int]]:
    return {name: list(array.shape) for name, array in arrays.items()}


@jax.jit
def _finite(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: jnp.isfinite(array).all() for name, array in arrays.items()}


@jax.jit
def _bit_sums(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    def bits(array: jax.Array) -> jax.Array:
        unsigned = jnp.dtype(f"uint{8 * array.dtype.itemsize}")
        return jax.lax.bitcast_convert_type(array, unsigned).astype(jnp.uint32)

    return {name: jnp.sum(bits(array), dtype=jnp.uint32) for name, array in arrays.items()}


def _sums(arrays: dict[str, jax.Array]) -> dict[str, int]:
    """Each array's bit patterns added up modulo 2**32: the same on every mesh, and one changed byte changes it."""
    return {name: int(value) for name, value in jax.device_get(_bit_sums(arrays)).items()}


def _difference(facts: dict[str, Any], target: dict[str, Any]) -> str:
    """The first array that differs, and what to do about it."""
    there, wanted = facts["shapes"], _shapes(target)
    name = next(name for name in [*wanted, *there] if there.get(name) != wanted.get(name))
    cure = "restore the config's model and data sections, or start anew under another --name"
    return f"{name} is {there.get(name, 'missing')} there and {wanted.get(name, 'missing')} here: {cure}"


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
