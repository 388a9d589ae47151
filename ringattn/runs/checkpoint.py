"""Checkpoints of any pytree: written asynchronously, verified on restore, restored on any mesh.

Orbax writes a checkpoint under a temporary name and renames it once complete, so a killed process leaves no partial
checkpoint. Orbax does not detect bytes that changed on disk, so a checksum of each array is stored with it.
"""

import hashlib
import json
import os
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from ringattn.config import option
from ringattn.units import first_line

Tree = TypeVar("Tree")


def saved_steps(directory: Path) -> list[int]:
    """Returns the steps of the complete checkpoints in `directory`, newest first; [] if the directory is missing."""
    names = [entry.name for entry in directory.iterdir()] if directory.is_dir() else []
    return sorted((int(name) for name in names if name.isdecimal()), reverse=True)


class Checkpoints:
    """Writes and reads `directory`/<step>/ and keeps the newest `keep`. Exiting waits for the last write."""

    def __init__(self, directory: Path, keep: int):
        self._directory = directory.absolute()
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(self._directory, options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._manager.close()

    def save(self, step: int, tree: Any) -> None:
        """Starts an asynchronous write of `tree`, whose arrays may be donated immediately.

        Raises ValueError, and writes nothing, if `tree` contains NaN or infinity: no run could resume from it. Also
        raises any error of the previous write.
        """
        arrays = _named(tree)
        non_finite = [name for name, finite in jax.device_get(_is_finite(arrays)).items() if not finite]
        if non_finite:
            fix = f"lower --{option('optimizer.learning_rate')} and start a new run with another --name"
            raise ValueError(f"{non_finite[0]} contains NaN or infinity after step {step}; no checkpoint saved; {fix}")
        metadata = {"shapes": _shapes(arrays), "sums": _checksums(arrays)}
        args = ocp.args.Composite(state=ocp.args.StandardSave(arrays), facts=ocp.args.JsonSave(metadata))
        self._manager.save(step, args=args, force=True)

    def restore(self, like: Tree) -> tuple[Tree, list[str]]:
        """Returns the newest intact tree, and a message for each damaged checkpoint that was skipped.

        `like` is an abstract tree with shardings, which the restored arrays get. Damaged checkpoints are renamed to
        `damaged-<step>`, so that the run can write those steps again.

        Raises ValueError if the newest intact checkpoint does not match `like`, or if none can be read.
        """
        damaged: dict[int, str] = {}
        target = _named(like)
        for step in saved_steps(self._directory):
            try:
                metadata = _read_metadata(self._manager, step)
                matches = metadata["shapes"] == _shapes(target)
                arrays = _read_arrays(self._manager, step, target, metadata["sums"]) if matches else None
            except (MemoryError, PermissionError):  # not a damaged file
                raise
            except Exception as error:  # reading a damaged file can raise any exception
                damaged[step] = f"checkpoint {step} is damaged ({first_line(error)})"
                continue
            if arrays is None:
                raise ValueError(f"{self._directory / str(step)} does not match: {_difference(metadata, target)}")
            self._rename_damaged(list(damaged))
            messages = [f"{reason}; using an earlier checkpoint" for reason in damaged.values()]
            return jax.tree.unflatten(jax.tree.structure(like), list(arrays.values())), messages
        reasons = ", ".join(damaged.values())
        raise ValueError(f"no readable checkpoint in {self._directory}: {reasons}; start a new run with another --name")

    def _rename_damaged(self, steps: list[int]) -> None:
        if jax.process_index() == 0:
            for step in steps:
                names = (f"damaged-{step}" + f"-{suffix}" * bool(suffix) for suffix in count())
                unused = next(name for name in names if not (self._directory / name).exists())
                os.replace(self._directory / str(step), self._directory / unused)
        self._manager.reload()


def read_params(directory: Path, step: int, like: Tree) -> Tree:
    """Returns the parameters of checkpoint `step` in `directory`, with the shardings of `like`. Writes nothing.

    Raises ValueError if the checkpoint is damaged or does not match `like`.
    """
    target = {f"params.{name}": leaf for name, leaf in _named(like).items()}
    try:
        with _reader(directory) as manager:
            metadata = _read_metadata(manager, step)
            stored = {name: shape for name, shape in metadata["shapes"].items() if name.startswith("params.")}
            if stored == _shapes(target):
                arrays = _read_arrays(manager, step, target, metadata["sums"])
                return jax.tree.unflatten(jax.tree.structure(like), list(arrays.values()))
    except (MemoryError, PermissionError):  # not a damaged file
        raise
    except Exception as error:  # reading a damaged file can raise any exception
        raise ValueError(f"{directory / str(step)} is damaged ({first_line(error)}); use another checkpoint") from error
    raise ValueError(f"{directory / str(step)} does not match: {_difference(metadata, target)}")


def params_digest(directory: Path, step: int) -> str:
    """Returns a hexadecimal digest of the parameters of checkpoint `step`. Raises ValueError if it cannot be read."""
    try:
        with _reader(directory) as manager:
            sums = _read_metadata(manager, step)["sums"]
        sums = {name: value for name, value in sums.items() if name.startswith("params.")}
    except Exception as error:  # reading a damaged file can raise any exception
        raise ValueError(f"{directory / str(step)} is damaged ({first_line(error)}); use another checkpoint") from error
    return hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()[:16]


def _reader(directory: Path) -> ocp.CheckpointManager:
    return ocp.CheckpointManager(directory.absolute(), options=ocp.CheckpointManagerOptions(create=False))


def _read_metadata(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
    return manager.restore(step, args=ocp.args.Composite(facts=ocp.args.JsonRestore()))["facts"]


def _read_arrays(
    manager: ocp.CheckpointManager, step: int, target: dict[str, Any], sums: dict[str, int]
) -> dict[str, jax.Array]:
    """Reads the arrays named in `target`, a subset of the checkpoint. Raises ValueError if a checksum differs."""
    restore_args = ocp.checkpoint_utils.construct_restore_args(target)
    args = ocp.args.PyTreeRestore(target, restore_args=restore_args, partial_restore=True)
    arrays = manager.restore(step, args=ocp.args.Composite(state=args))["state"]
    arrays = {name: arrays[name] for name in target}
    changed = [name for name, value in _checksums(arrays).items() if value != sums[name]]
    if changed:
        raise ValueError(f"the checksum of {changed[0]} differs")
    return arrays


def _named(tree: Any) -> dict[str, Any]:
    """Returns the leaves by path, such as 'params.layers.attention.query', in tree order."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _shapes(arrays: dict[str, Any]) -> dict[str, list[int]]:
    return {name: list(array.shape) for name, array in arrays.items()}


@jax.jit
def _is_finite(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: jnp.isfinite(array).all() for name, array in arrays.items()}


@jax.jit
def _bit_sums(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    def bits(array: jax.Array) -> jax.Array:
        unsigned = jnp.dtype(f"uint{8 * array.dtype.itemsize}")
        return jax.lax.bitcast_convert_type(array, unsigned).astype(jnp.uint32)

    return {name: jnp.sum(bits(array), dtype=jnp.uint32) for name, array in arrays.items()}


def _checksums(arrays: dict[str, jax.Array]) -> dict[str, int]:
    """Returns the sum of each array's bit patterns modulo 2**32, which does not depend on the mesh."""
    return {name: int(value) for name, value in jax.device_get(_bit_sums(arrays)).items()}


def _difference(metadata: dict[str, Any], target: dict[str, Any]) -> str:
    """Returns a message that names the first array whose shape differs, both shapes and a fix."""
    stored, expected = metadata["shapes"], _shapes(target)
    name = next(name for name in [*expected, *stored] if stored.get(name) != expected.get(name))
    fix = "restore the config's model and data sections, or start a new run with another --name"
    stored_shape, shape = stored.get(name, "missing"), expected.get(name, "missing")
    return f"the shape of {name} is {stored_shape} in the checkpoint but {shape} in the config's model; {fix}"
