"""Checkpoints of any pytree: written asynchronously, verified on restore, restored on any mesh.

Orbax writes a checkpoint under a temporary name and renames it once it is complete and confirmed, so neither a killed
process nor a diverged run leaves a checkpoint that no run can resume from. Orbax does not detect bytes that changed on
disk, so a checksum of each array is stored with it.
"""

import os
import re
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from tempfile import TemporaryFile
from types import TracebackType
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp

from ringattn.config import option
from ringattn.mesh.processes import gather, several_processes
from ringattn.runs.files import cannot_write
from ringattn.runs.reading import MismatchError, read_arrays, unreadable
from ringattn.runs.verification import (
    Arrays,
    facts,
    is_damage,
    named,
    non_finite,
    reason,
    remove_undecodable,
)
from ringattn.runs.write_agreement import PeerError, WriteAgreement
from ringattn.units import bytes_in_words

Tree = TypeVar("Tree")

_MAX_SECONDS = 7 * 24 * 3600
"""Timeout of a write in seconds. It includes the step that confirms the checkpoint."""


def saved_steps(directory: Path) -> list[int]:
    """Returns the steps of the complete checkpoints in `directory`, newest first; [] if the directory is missing.

    Ignores everything except directories that have a step as their name.
    """
    names = [entry.name for entry in directory.iterdir() if entry.is_dir()] if directory.is_dir() else []
    return sorted((int(name) for name in names if re.fullmatch("[1-9][0-9]*", name)), reverse=True)


def divergence_fix() -> str:
    """Returns the fix for messages about diverged training."""
    flag = option("optimizer.learning_rate")
    return f"lower --{flag} and run the command again: it resumes from the newest checkpoint, if there is one"


class _UnconfirmedError(Exception):
    """Ends the write of a checkpoint that was not confirmed."""


class _StateHandler(ocp.StandardCheckpointHandler):
    async def async_save(self, *args: Any, **options: Any) -> list[Any]:
        self._saved: _StateSave = options["args"]
        self._saved.writes += await super().async_save(*args, **options) or []
        return [*self._saved.writes, self._saved.confirmed]

    def finalize(self, directory: Any) -> None:
        if self._saved.failed:
            raise _UnconfirmedError
        super().finalize(directory)


@ocp.args.register_with_handler(_StateHandler, for_save=True, for_restore=True)  # Orbax requires both
@dataclass
class _StateSave(ocp.args.StandardSave):
    """Saves `item`. The checkpoint gets its final name once it is written completely and `confirmed` has a result."""

    confirmed: Future[None] = field(default_factory=Future)
    writes: list[Any] = field(default_factory=list)
    """Futures of the threads that write arrays."""
    failed: bool = False
    """True if a part of the write has failed, while its other threads may continue."""


class UnwritableError(Exception):
    """Raised if one of several processes cannot start a write. The other processes cannot continue."""


@dataclass
class _Verified:
    """Preserves checkpoint `step`, whose checksums have been compared. A policy of Orbax."""

    step: int = 0

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        return [each.step == self.step for each in checkpoints]


class Checkpoints:
    """Writes and reads `directory`/<step>/. Keeps the newest `keep`, and the one that `restore` has verified.

    A checkpoint appears under its name only after `confirm`. Exiting waits for the write of a confirmed one and drops
    an unconfirmed one.

    Without `report`, a failed write raises ValueError. With it, `report` takes a line about each failed write, and
    later writes are tried. A write that fails in one of several processes fails in all.
    """

    def __init__(self, directory: Path, keep: int, report: Callable[[str], None] | None = None, *, verified: int = 0):
        """`verified` is the step that an earlier instance has restored."""
        self._directory, self._keep, self._report = directory.absolute(), keep, report
        self._verified = _Verified(verified)
        self._agreement = WriteAgreement()
        self._manager = self._new_manager()
        self._write: _StateSave | None = None  # the last one
        self._writing = 0  # its step
        self._broken = False  # after an error, Orbax would raise it again in later writes
        self.failures = 0
        """Number of checkpoints that could not be written."""

    def _new_manager(self) -> ocp.CheckpointManager:
        policies = ocp.checkpoint_managers.LatestN(self._keep), self._verified
        options = ocp.CheckpointManagerOptions(
            preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy(policies),
            cleanup_tmp_directories=True,
            async_options=ocp.AsyncOptions(
                timeout_secs=_MAX_SECONDS,
                barrier_sync_fn=self._agreement.meet,
                create_directories_asynchronously=False,  # else a failure in process 0 holds the others for 300 s
            ),
        )
        for step in saved_steps(self._directory):
            remove_undecodable(self._directory / str(step) / "_CHECKPOINT_METADATA")
        try:
            return ocp.CheckpointManager(self._directory, options=options)
        except OSError as error:
            raise unreadable(self._directory, error) from error

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            with suppress(*[ValueError] * (kind is not None)):  # the first error is reported
                self._drop_unconfirmed()
                self._settle()
        finally:
            self._close()

    def save(self, step: int, tree: Any) -> None:
        """Starts an asynchronous write of `tree`, whose arrays may be donated immediately.

        Replaces an unconfirmed checkpoint. Raises ValueError, and writes nothing, if `tree` contains NaN
        or infinity: no run could resume from it. Raises UnwritableError.
        """
        self._drop_unconfirmed()
        self._settle()  # otherwise Orbax would raise the error of the previous write as that of this one
        if self._broken:
            self._close()
        arrays = named(tree)
        if names := non_finite(arrays):
            problem = f"{names[0]} contains NaN or infinity after step {step}; no checkpoint saved"
            raise ValueError(f"{problem}; {divergence_fix()}")
        self._writing = step
        self._agreement.begin()
        answers = gather(f"{self._broken:d}{self._obstacle(arrays)}")
        if obstacle := answers[0][1:]:
            self._fail(obstacle)
            return
        if any(answer.startswith("1") for answer in answers):
            self._close()
            self._manager, self._broken = self._new_manager(), False
        self._write = state = _StateSave(arrays)
        args = ocp.args.Composite(state=state, facts=ocp.args.JsonSave(facts(arrays)))
        try:
            self._manager.save(step, args=args, force=True)
        except Exception as error:  # the disk and the libraries that write can raise any exception
            if several_processes():  # the others wait in a barrier of Orbax
                raise UnwritableError(str(cannot_write(self._directory, reason(error)))) from error
            state.confirmed.set_exception(_UnconfirmedError())
            self._fail(reason(error), error)
            return
        self._agreement.forget_previous()

    def _obstacle(self, arrays: Arrays) -> str:
        """Returns a message if process 0 cannot create files or has less space than `arrays` need; else ""."""
        if jax.process_index() > 0:
            return ""
        needed = sum(array.nbytes for array in arrays.values())
        try:
            self._directory.mkdir(parents=True, exist_ok=True)  # Orbax may not have created it yet
            with TemporaryFile(dir=self._directory):
                free = shutil.disk_usage(self._directory).free
        except OSError as error:
            return reason(error)
        message = f"it needs {bytes_in_words(needed)}, and {bytes_in_words(free)} are free"
        return message if free < needed else ""

    def confirm(self, step: int) -> None:
        """Confirms that runs can resume from the states up to `step`. Completes a pending checkpoint of such a state.

        Call it after each step, in all processes; it does not wait.
        """
        if (write := self._unconfirmed()) is not None and self._writing <= step:
            write.confirmed.set_result(None)
        if not self._manager.is_saving_in_progress():
            self._settle()

    def _unconfirmed(self) -> _StateSave | None:
        return None if self._write is None or self._write.confirmed.done() else self._write

    def _drop_unconfirmed(self) -> None:
        if (write := self._unconfirmed()) is not None:
            write.confirmed.set_exception(_UnconfirmedError())
            self._settle()

    def _settle(self) -> None:
        """Waits for the current write, and reports it if it has failed."""
        try:
            self._manager.wait_until_finished()
        except _UnconfirmedError:
            self._broken = True
        except Exception as error:  # the disk and the libraries that write can raise any exception
            self._fail(str(error) if isinstance(error, PeerError) else reason(error), error)

    def _fail(self, problem: str, error: Exception | None = None) -> None:
        """Tells the other processes that the current write has failed, and reports or raises it.

        Its other threads may continue: see `_close`.
        """
        if self._write is not None:
            self._write.failed = True
        self._agreement.fail(problem)
        self._broken = True
        saved = self._writing in saved_steps(self._directory)  # Orbax then removes earlier ones
        self.failures += not saved
        if self._report is None:
            raise cannot_write(self._directory, problem) from error
        if saved:
            self._report(f"checkpoint {self._writing} was saved, but an earlier one was not removed ({problem})")
            return
        fix = "later ones will be tried; free disk space or make it writable"
        self._report(f"checkpoint {self._writing} was not saved to {self._directory} ({problem}); {fix}")

    def _close(self) -> None:
        """Waits for all threads of the last write, and removes what they have not completed."""
        with suppress(Exception):  # Orbax raises errors that `_settle` has handled again
            self._manager.close()
        for future in self._write.writes if self._write is not None else []:
            with suppress(Exception):
                future.result()
        if jax.process_index() == 0:
            for path in self._directory.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(path, ignore_errors=True)

    def restore(self, like: Tree) -> tuple[Tree, list[str]]:
        """Returns the newest intact tree, and a message for each damaged checkpoint that was skipped.

        `like` is an abstract tree with shardings, which the restored arrays get. Damaged checkpoints are renamed to
        `damaged-<step>`, so that the run can write those steps again.

        Raises MismatchError, a ValueError, if the newest intact checkpoint does not match `like`. Raises ValueError if
        none can be read, or if reading fails without evidence of damage.
        """
        damaged: dict[int, str] = {}
        target = named(like)
        for step in saved_steps(self._directory):
            try:
                arrays = read_arrays(self._directory / str(step), target, "")
            except MismatchError as error:
                raise MismatchError(f"{self._directory / str(step)} does not match: {error}") from None
            except Exception as error:  # reading a damaged file can raise any exception
                if not is_damage(error):
                    raise unreadable(self._directory / str(step), error) from error
                damaged[step] = f"checkpoint {step} is damaged ({reason(error)})"
                continue
            self._rename_damaged(list(damaged))
            self._verified.step = step
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
        gather("")  # the other processes must not list the old names
        self._manager.reload()
