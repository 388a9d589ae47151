"""TensorBoard and Weights & Biases: what metrics.jsonl keeps, for those who want to watch it there.

A run must not end because somebody's disk or server does. A writer that cannot be opened is a mistake when a run
begins, and the run does not begin; one that fails later, even when a run goes on after a restart, is left out from then
on, with a line on the screen: metrics.jsonl has every row.
"""

import importlib
import importlib.util
import os
import time
import uuid
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import jax

from ringattn import config
from ringattn.training.checkpoint import first_line
from ringattn.training.metrics import Row, Screen

PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}
"""Each writer's field in the config's section log, which is its extra, too, and the package that it needs."""


def check_packages(c: config.Log) -> None:
    """Raises ValueError if a writer is wanted whose package is not installed."""
    for field, package in PACKAGES.items():
        if vars(c)[field] and importlib.util.find_spec(package) is None:
            cure = f"pip install 'ringattn[{field}]', or --log.{field} False"
            raise ValueError(f"log.{field}=True needs the package {package}: {cure}")


class Writer(Protocol):
    def write(self, row: Row) -> None: ...

    def close(self, failed: bool) -> None: ...


class TensorBoard:
    """Scalars in `folder`, each under its name in metrics.jsonl: `tensorboard --logdir runs` shows them."""

    def __init__(self, folder: Path, after: int):
        """Goes on after step `after`: what an earlier start wrote beyond it is declared void."""
        # The writer's synchronous part. Its SummaryWriter hands over to a thread, and hangs once that has died.
        files = importlib.import_module("tensorboardX.event_file_writer")
        self._events = importlib.import_module("tensorboardX.proto.event_pb2")
        self._scalar = importlib.import_module("tensorboardX.summary").scalar
        folder.mkdir(parents=True, exist_ok=True)
        # Two starts within a second would otherwise share a file name.
        self._file = files.EventsWriter(str(folder / "events"), f".{after}.{os.getpid()}")
        begins = self._events.SessionLog(status=self._events.SessionLog.START)
        self._file.write_event(self._event(after + 1, session_log=begins))
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
    """A W&B run beside the run: offline, in `folder`/wandb, unless WANDB_MODE=online asks for the server.

    Every start goes on with the same W&B run, whose x axis is the step: rows that a start repeats after it was cut off
    lie upon those it had written.
    """

    def __init__(self, c: config.Config, folder: Path):
        package = importlib.import_module("wandb")
        identity = folder / "wandb" / "run_id"
        if not identity.is_file():
            identity.parent.mkdir(parents=True, exist_ok=True)
            identity.write_text(uuid.uuid4().hex[:12], encoding="utf-8")
        self._run = package.init(
            project=os.environ.get("WANDB_PROJECT", "ringattn"),
            name=c.name,
            id=identity.read_text(encoding="utf-8"),
            resume="allow",
            dir=str(folder),
            config=asdict(c),
            mode=os.environ.get("WANDB_MODE", "offline"),
            settings=package.Settings(console="off", silent=True),  # the screen is ours
        )
        self._run.define_metric("*", step_metric="step")

    def write(self, row: Row) -> None:
        self._run.log({name: value for name, value in row.items() if value is not None})

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class Writers:
    """The writers that a config asks for, of the first process alone; a context that closes them."""

    def __init__(self, c: config.Config, after: int, screen: Screen):
        """Opens them to go on after step `after`. Raises ValueError if one cannot be opened, and `after` is 0."""
        self._screen, self._open = screen, dict[str, Writer]()
        wanted = [field for field in PACKAGES if vars(c.log)[field] and jax.process_index() == 0]
        for field in wanted:
            try:
                is_board = field == "tensorboard"
                opened = TensorBoard(c.folder / field, after) if is_board else WeightsAndBiases(c, c.folder)
                self._open[field] = opened
            except Exception as error:  # whatever a library, a disk or a server raises
                if after:
                    self._say(field, error)
                    continue
                self.__exit__(type(error))
                cures = f"--log.{field} False" + ", WANDB_MODE=offline or `wandb login`" * (not is_board)
                raise ValueError(
                    f"log.{field}=True, but it cannot be written ({first_line(error)}): use {cures}"
                ) from None

    def __enter__(self) -> "Writers":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        self._each(lambda writer: writer.close(kind is not None))

    def write(self, row: Row) -> None:
        """Hands a row of metrics.jsonl to all; one that raises gets no more."""
        self._each(lambda writer: writer.write(row))

    def _each(self, do: Any) -> None:
        for field, writer in list(self._open.items()):
            try:
                do(writer)
            except Exception as error:  # as above; the run is worth more than its picture
                del self._open[field]
                self._say(field, error)

    def _say(self, field: str, error: Exception) -> None:
        self._screen.say(f"{field} failed ({first_line(error)}): going on without it; metrics.jsonl has every row")
