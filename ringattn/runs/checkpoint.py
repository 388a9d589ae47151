"""Checkpoints of any pytree: written asynchronously, verified on restore, restored on any mesh.

Orbax writes a checkpoint under a temporary name and renames it once it is complete and confirmed, so neither a killed
process nor a diverged run leaves a checkpoint that no run can resume from. Orbax does not detect bytes that changed on
disk, so a checksum of each array is stored with it.
"""

import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp

from ringattn.config import option
from ringattn.runs import orbax_messages
from ringattn.runs.files import cannot_write
from ringattn.runs.verification import (
    Arrays,
    Facts,
    check_arrays,
    check_facts,
    difference,
    facts,
    is_damage,
    named,
    non_finite,
    reason,
    shapes,
)

Tree = TypeVar("Tree")

_MAX_SECONDS = 7 * 24 * 3600
"""Timeout of a write in seconds. It includes the step that confirms the checkpoint."""
_MAX_BARRIER_SECONDS = 1200
"""Maximum seconds to wait for the writes of other processes."""
orbax_messages.silence()


def saved_steps(directory: Path) -> list[int]:
    """Returns the steps of the complete checkpoints in `directory`, newest first; [] if the directory is missing.

    Ignores everything except directories that have a step as their name.
    """
    names = [entry.name for entry in directory.iterdir() if entry.is_dir()] if directory.is_dir() else []
    return sorted((int(name) for name in names if re.fullmatch("[1-9][0-9]*", name)), reverse=True)


def _wait_for_processes(*, key: str, timeout_ms: int) -> None:
    """Waits for the other processes at barrier `key`, unless the write in this process has failed.

    After a failure, this process skips an earlier barrier, so the others would never reach this one.
    """
    if sys.exc_info()[0] is None:
        barrier = ocp.multihost.get_barrier_sync_fn()
        barrier(key=key, timeout_ms=min(timeout_ms, 1000 * _MAX_BARRIER_SECONDS))


def divergence_fix() -> str:
    """Returns the fix for messages about diverged training."""
    flag = option("optimizer.learning_rate")
    return f"lower --{flag} and run the command again: it resumes from the newest checkpoint, if there is one"


class _UnconfirmedError(Exception):
    """Ends the write of a checkpoint that was not confirmed."""


class _StateHandler(ocp.StandardCheckpointHandler):
    async def async_save(self, *args: Any, **options: Any) -> list[Any]:
        return [*(await super().async_save(*args, **options) or []), options["args"].confirmed]


@ocp.args.register_with_handler(_StateHandler, for_save=True, for_restore=True)  # Orbax requires both
@dataclass
class _StateSave(ocp.args.StandardSave):
    """Saves `item`. The checkpoint gets its final name once it is written completely and `confirmed` has a result."""

    confirmed: Future[None] = field(default_factory=Future)


class Checkpoints:
    """Writes and reads `directory`/<step>/ and keeps the newest `keep`.

    A checkpoint appears under its name only after `confirm`. Exiting waits for the write of a confirmed one and drops
    an unconfirmed one.
    """

    def __init__(self, directory: Path, keep: int):
        self._directory = directory.absolute()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            cleanup_tmp_directories=True,
            async_options=ocp.AsyncOptions(timeout_secs=_MAX_SECONDS, barrier_sync_fn=_wait_for_processes),
        )
        try:
            self._manager = ocp.CheckpointManager(self._directory, options=options)
        except OSError as error:
            raise _unreadable(self._directory, error) from error
        self._unconfirmed: tuple[int, Future[None]] | None = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with suppress(*[ValueError] * (kind is not None)):  # the first error is reported
            self._drop_unconfirmed()
            with self._write_errors():
                self._manager.close()
        if kind is not None:
            self._remove_incomplete()  # of a write that continued after the error

    def save(self, step: int, tree: Any) -> None:
        """Starts an asynchronous write of `tree`, whose arrays may be donated immediately.

        Replaces an unconfirmed checkpoint. Raises ValueError, and writes nothing, if `tree` contains NaN
        or infinity: no run could resume from it. Also raises ValueError if the previous write failed.
        """
        self._drop_unconfirmed()
        arrays = named(tree)
        if names := non_finite(arrays):
            problem = f"{names[0]} contains NaN or infinity after step {step}; no checkpoint saved"
            raise ValueError(f"{problem}; {divergence_fix()}")
        state = _StateSave(arrays)
        args = ocp.args.Composite(state=state, facts=ocp.args.JsonSave(facts(arrays)))
        with self._write_errors():
            self._manager.save(step, args=args, force=True)
        self._unconfirmed = step, state.confirmed

    def confirm(self, step: int) -> None:
        """Confirms that runs can resume from the states up to `step`. Completes a pending checkpoint of such a state.

        Raises ValueError if a write has failed. Call it after each step; it does not wait.
        """
        if self._unconfirmed is not None and self._unconfirmed[0] <= step:
            self._unconfirmed[1].set_result(None)
            self._unconfirmed = None
        if not self._manager.is_saving_in_progress():
            with self._write_errors():
                self._manager.wait_until_finished()

    def _drop_unconfirmed(self) -> None:
        if self._unconfirmed is not None:
            self._unconfirmed[1].set_exception(_UnconfirmedError())
            self._unconfirmed = None
            with suppress(_UnconfirmedError), self._write_errors():
                self._manager.wait_until_finished()
            self._remove_incomplete()
            self._manager.reload()  # Orbax no longer lists the checkpoints that this one would have replaced

    @contextmanager
    def _write_errors(self) -> Iterator[None]:
        """Converts errors of Orbax and of the disk to ValueError with a fix."""
        try:
            yield
        except _UnconfirmedError:
            raise
        except Exception as error:  # the disk and the libraries that write can raise any exception
            self._remove_incomplete()
            raise cannot_write(self._directory, reason(error)) from error

    def _remove_incomplete(self) -> None:
        if jax.process_index() == 0:
            for path in self._directory.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(path, ignore_errors=True)

    def restore(self, like: Tree) -> tuple[Tree, list[str]]:
        """Returns the newest intact tree, and a message for each damaged checkpoint that was skipped.

        `like` is an abstract tree with shardings, which the restored arrays get. Damaged checkpoints are renamed to
        `damaged-<step>`, so that the run can write those steps again.

        Raises ValueError if the newest intact checkpoint does not match `like`, if none can be read, or if reading
        fails without evidence of damage.
        """
        damaged: dict[int, str] = {}
        target = named(like)
        for step in saved_steps(self._directory):
            try:
                arrays = _read(self._manager, step, target, "")
            except _MismatchError as error:
                raise ValueError(f"{self._directory / str(step)} does not match: {error}") from None
            except Exception as error:  # reading a damaged file can raise any exception
                if not is_damage(error):
                    raise _unreadable(self._directory / str(step), error) from error
                damaged[step] = f"checkpoint {step} is damaged ({reason(error)})"
                continue
            self._rename_damaged(list(damaged))
            messages = [f"{each}; using an earlier checkpoint" for each in damaged.values()]
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

    Raises ValueError if the checkpoint is damaged, does not match `like`, or cannot be read.
    """
    target = {f"params.{name}": leaf for name, leaf in named(like).items()}
    with _read_errors(directory / str(step)), _reader(directory) as manager:
        arrays = _read(manager, step, target, "params.")
        return jax.tree.unflatten(jax.tree.structure(like), list(arrays.values()))


def params_digest(directory: Path, step: int) -> str:
    """Returns a hexadecimal digest of the parameters of checkpoint `step`. Raises ValueError if it cannot be read."""
    with _read_errors(directory / str(step)), _reader(directory) as manager:
        sums = _read_facts(manager, step)["sums"]
    sums = {name: value for name, value in sums.items() if name.startswith("params.")}
    return hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()[:16]


class _MismatchError(Exception):
    """Raised if the arrays of an intact checkpoint do not match the model."""


@contextmanager
def _read_errors(checkpoint: Path) -> Iterator[None]:
    """Converts read errors to ValueError with a fix."""
    try:
        yield
    except _MismatchError as error:
        raise ValueError(f"{checkpoint} does not match: {error}") from None
    except Exception as error:  # reading a damaged file can raise any exception
        if not is_damage(error):
            raise _unreadable(checkpoint, error) from error
        raise ValueError(f"{checkpoint} is damaged ({reason(error)}); use another checkpoint") from error


def _unreadable(checkpoint: Path, error: Exception) -> ValueError:
    fix = "but may be intact; nothing was changed; fix the cause and run the same command again"
    return ValueError(f"{checkpoint} cannot be read ({reason(error)}), {fix}")


def _reader(directory: Path) -> ocp.CheckpointManager:
    return ocp.CheckpointManager(directory.absolute(), options=ocp.CheckpointManagerOptions(create=False))


def _read(manager: ocp.CheckpointManager, step: int, target: Arrays, prefix: str) -> dict[str, jax.Array]:
    """Reads the arrays named in `target`: those of the checkpoint whose names start with `prefix`.

    Raises _MismatchError unless they have the same names and shapes.
    """
    stored = _read_facts(manager, step)
    if {name: shape for name, shape in stored["shapes"].items() if name.startswith(prefix)} != shapes(target):
        raise _MismatchError(difference(stored, target))
    return _read_arrays(manager, step, target, stored["sums"])


def _read_facts(manager: ocp.CheckpointManager, step: int) -> Facts:
    stored = manager.restore(step, args=ocp.args.Composite(facts=ocp.args.JsonRestore()))["facts"]
    check_facts(stored)
    return stored


def _read_arrays(
    manager: ocp.CheckpointManager, step: int, target: Arrays, sums: dict[str, int]
) -> dict[str, jax.Array]:
    """Reads the arrays named in `target`, a subset of the checkpoint. Raises ValueError if a checksum differs."""
    restore_args = ocp.checkpoint_utils.construct_restore_args(target)
    args = ocp.args.PyTreeRestore(target, restore_args=restore_args, partial_restore=True)
    arrays = manager.restore(step, args=ocp.args.Composite(state=args))["state"]
    arrays = {name: arrays[name] for name in target}
    check_arrays(arrays, sums)
    return arrays
