"""TensorBoard and Weights & Biases writers: both receive every row of metrics.jsonl.

A writer that cannot be opened when a run starts is an error. A failing disk or server must not stop a run later, so a
writer that fails during training, or when a run resumes, is dropped with a message.
"""

import importlib
import importlib.util
import os
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import jax

from ringattn import config
from ringattn.runs.files import write_text
from ringattn.runs.metrics import Row
from ringattn.runs.progress import Display
from ringattn.units import first_line

PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}
"""Package that each writer requires. The keys are fields of the config section `log` and names of pip extras."""


def check_packages(c: config.Log) -> None:
    """Raises ValueError if the package of a requested writer is not installed."""
    for field, package in PACKAGES.items():
        if vars(c)[field] and importlib.util.find_spec(package) is None:
            fix = f"pip install 'ringattn[{field}]', or use --log.{field} False"
            raise ValueError(f"log.{field}=True requires the package {package}; {fix}")


class Writer(Protocol):
    def write(self, row: Row) -> None: ...

    def close(self, failed: bool) -> None: ...


class TensorBoard:
    """Writes scalars to `directory` by their names in metrics.jsonl; view them with `tensorboard --logdir runs`."""

    def __init__(self, directory: Path, after: int):
        """Continues after step `after`: a session start event hides later steps of an interrupted launch."""
        # The synchronous EventsWriter: SummaryWriter writes in a thread, and hangs if that thread dies.
        files = importlib.import_module("tensorboardX.event_file_writer")
        self._events = importlib.import_module("tensorboardX.proto.event_pb2")
        self._scalar = importlib.import_module("tensorboardX.summary").scalar
        directory.mkdir(parents=True, exist_ok=True)
        # Without the process id, two launches within one second would use the same file name.
        self._file = files.EventsWriter(str(directory / "events"), f".{after}.{os.getpid()}")
        session_start = self._events.SessionLog(status=self._events.SessionLog.START)
        self._file.write_event(self._event(after + 1, session_log=session_start))
        self._file.flush()

    def write(self, row: Row) -> None:
        for name, value in row.items():
            if name != "step" and value is not None:
                self._file.write_event(self._event(row["step"], summary=self._scalar(name, value)))
        self._file.flush()

    def close(self, failed: bool) -> None:
        self._file.close()

    def _event(self, step: int, **content: Any) -> Any:
        return self._events.Event(step=step, wall_time=time.time(), **content)


class WeightsAndBiases:
    """Logs to a W&B run, offline in `directory`/wandb unless WANDB_MODE=online.

    All launches log to the same W&B run, with the step as x axis, so a resumed launch overwrites the rows that it
    repeats.
    """

    def __init__(self, c: config.Config, directory: Path):
        package = importlib.import_module("wandb")
        id_file = directory / "wandb" / "run_id"
        if not id_file.is_file():
            id_file.parent.mkdir(parents=True, exist_ok=True)
            write_text(id_file, uuid.uuid4().hex[:12])
        self._run = package.init(
            project=os.environ.get("WANDB_PROJECT", "ringattn"),
            name=c.name,
            id=id_file.read_text(encoding="utf-8"),
            resume="allow",
            dir=str(directory),
            config=asdict(c),
            mode=os.environ.get("WANDB_MODE", "offline"),
            settings=package.Settings(console="off", silent=True),  # otherwise W&B output would break the progress bar
        )
        self._run.define_metric("*", step_metric="step")

    def write(self, row: Row) -> None:
        self._run.log({name: value for name, value in row.items() if value is not None})

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class Writers:
    """The writers enabled in a config, in process 0 only. Leaving the context closes them."""

    def __init__(self, c: config.Config, after: int, display: Display):
        """Opens the writers to continue after step `after`. Raises ValueError if one fails to open and `after` is 0."""
        self._display, self._writers = display, dict[str, Writer]()
        enabled = [field for field in PACKAGES if vars(c.log)[field] and jax.process_index() == 0]
        for field in enabled:
            try:
                is_wandb = field == "wandb"
                self._writers[field] = (
                    WeightsAndBiases(c, c.run_directory) if is_wandb else TensorBoard(c.run_directory / field, after)
                )
            except Exception as error:  # a library, disk or server can raise any exception
                if after:
                    self._report(field, error)
                    continue
                self.__exit__(type(error))
                fix = f"--log.{field} False" + ", WANDB_MODE=offline or `wandb login`" * is_wandb
                raise ValueError(
                    f"log.{field}=True, but it cannot be written ({first_line(error)}); use {fix}"
                ) from None

    def __enter__(self) -> "Writers":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        self._for_each(lambda writer: writer.close(kind is not None))

    def write(self, row: Row) -> None:
        """Writes a row of metrics.jsonl to all writers; drops a writer that raises an exception."""
        self._for_each(lambda writer: writer.write(row))

    def _for_each(self, action: Callable[[Writer], None]) -> None:
        for field, writer in list(self._writers.items()):
            try:
                action(writer)
            except Exception as error:  # a failing writer must not stop the run
                del self._writers[field]
                self._report(field, error)

    def _report(self, field: str, error: Exception) -> None:
        self._display.print(f"{field} failed ({first_line(error)}): continuing without it; metrics.jsonl has all rows")
