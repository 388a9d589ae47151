"""What a run says while it goes on: progress on the screen, and a row of metrics.jsonl every few steps."""

import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ringattn.training.by_context import losses_by_context
from ringattn.training.step import Metrics
from ringattn.units import bytes_in_words

Row = dict[str, Any]
"""An object of metrics.jsonl: `step`, and numbers by name, None where one is not known."""


class MetricsFile:
    """metrics.jsonl: one JSON object a line, on disk as soon as it is written, by the first process alone."""

    def __init__(self, path: Path, after: int):
        """Opens `path` to go on after step `after`: rows beyond it, of a run that was cut off, are cut away."""
        kept = [row for row in read_rows(path) if row["step"] <= after]
        self._file = None
        if jax.process_index() == 0:
            unfinished = path.with_name(f".{path.name}.{os.getpid()}")
            unfinished.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
            os.replace(unfinished, path)
            self._file = path.open("a", encoding="utf-8")

    def __enter__(self) -> "MetricsFile":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def write(self, row: Row) -> None:
        if self._file is not None:
            self._file.write(json.dumps(row, allow_nan=False) + "\n")
            self._file.flush()

    def sync(self) -> None:
        """Has the rows written so far on the disk, so that even a power cut leaves them to a checkpoint that does."""
        if self._file is not None:
            os.fsync(self._file.fileno())


def read_rows(path: Path) -> list[Row]:
    """The rows of a metrics.jsonl, none if there is no file; a last line that was never finished is left out."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    try:
        return [json.loads(line) for line in lines if line.endswith("\n")]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} holds a damaged line ({error}): mend or remove it, or use another --name") from None


class Screen:
    """A live line on a terminal, plain lines elsewhere; only the first process speaks."""

    def __init__(self, steps: int, done: int):
        """Of a run, or a stage, that ends after step `steps`; `done` of them are done."""
        self._console = Console(quiet=jax.process_index() != 0, highlight=False, soft_wrap=True)
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
        self._live = Progress(*columns, console=self._console, disable=not self._console.is_terminal)
        self._task = self._live.add_task("", total=steps, completed=done)
        self._steps, self._begin = steps, (done, time.monotonic())

    def __enter__(self) -> "Screen":
        self._live.start()
        self._begin = self._begin[0], time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def say(self, text: str) -> None:
        self._console.print(text, markup=False)

    def show(self, row: Row) -> None:
        """Progress at a logged step: the live line, or a plain one."""
        step, speed = row["step"], f"loss {row['loss']:.4f}  {row['tokens_per_second']:,.0f} tokens/s"
        speed += "" if row["mfu"] is None else f"  mfu {row['mfu']:.1%}"
        speed += "" if row["peak_bytes"] is None else f"  peak {bytes_in_words(row['peak_bytes'])}"
        if self._console.is_terminal:
            self._live.update(self._task, completed=step, description=speed)
            return
        done, since = self._begin
        left = (time.monotonic() - since) / (step - done) * (self._steps - step)
        self.say(f"step {step}/{self._steps}  {speed}  {left / 60:.1f} min left")


class Recorder:
    """Reads each step's metrics when the next step is already on its way, so that the device never waits."""

    def __init__(
        self,
        write: Callable[[Row], None],
        screen: Screen,
        every: int,
        tokens: int,
        peak_flops: float | None,
        tokens_before: int = 0,
        always: tuple[int, ...] = (1,),
    ):
        """Rows come every `every` steps of `tokens` tokens, and after the steps `always`.

        `peak_flops` is what all devices could do in a second; `tokens_before` what the steps of earlier stages had more
        (or, negative, less) than this one's would have.
        """
        self._write, self._screen, self._every, self._tokens, self._peak = write, screen, every, tokens, peak_flops
        self._before, self._always = tokens_before, always
        self._pending: tuple[int, Metrics, int] | None = None
        self._seconds, self._steps, self._flops, self._mark = 0.0, 0, 0, time.monotonic()

    def step(self, step: int, metrics: Metrics, flops: int) -> None:
        """Takes the metrics of `step`, which may not be there yet, and settles those of the step before."""
        earlier, self._pending = self._pending, (step, metrics, flops)
        self._settle(earlier)

    def settle(self) -> None:
        """Waits for the last step and settles it. Raises ValueError if loss or gradient are no longer finite."""
        earlier, self._pending = self._pending, None
        self._settle(earlier)

    def restart_clock(self) -> None:
        """Leaves out of the speed what was done since the last step was settled."""
        self._mark = time.monotonic()

    def evaluation(self, step: int, values: dict[str, float]) -> str:
        """Writes and says the validation loss after `step`; returns it in words. Raises ValueError if not finite."""
        if not all(map(math.isfinite, values.values())):
            raise ValueError(f"the validation loss is {values['eval/loss']} after step {step}: lower the learning rate")
        self._write({"step": step} | values)
        bits = values.get("eval/bits_per_byte")
        text = f"validation loss {values['eval/loss']:.4f} nats per token"
        text += "" if bits is None else f", {bits:.4f} bits per byte"
        text += f", {values['eval/accuracy']:.1%} right"
        self._screen.say(f"step {step}: {text}")
        by_context = [f"{first:,} {loss:.4f}" for (first, _), loss in losses_by_context(values).items()]
        if len(by_context) > 1:
            self._screen.say(f"  by tokens of context, from: {', '.join(by_context)}")
        return text

    def _settle(self, earlier: tuple[int, Metrics, int] | None) -> None:
        if earlier is None:
            return
        step, metrics, flops = earlier
        values = {name: float(value) for name, value in metrics._asdict().items()}
        now = time.monotonic()
        self._seconds, self._steps, self._mark = self._seconds + now - self._mark, self._steps + 1, now
        self._flops += flops
        broken = [name for name, value in values.items() if not math.isfinite(value)]
        if broken:
            raise ValueError(
                f"{broken[0]} became {values[broken[0]]} at step {step}: lower --optimizer.learning_rate and go on "
                "from the last checkpoint, or start anew under another --name"
            )
        if step in self._always or step % self._every == 0:
            row = {"step": step} | values | self._speed(step)
            self._write(row)
            self._screen.show(row)
            self._seconds, self._steps, self._flops = 0.0, 0, 0

    def _speed(self, step: int) -> Row:
        seconds = self._seconds / self._steps
        return {
            "tokens": self._before + step * self._tokens,
            "tokens_per_second": self._tokens / seconds,
            "step_seconds": seconds,
            "mfu": None if self._peak is None else self._flops / (self._seconds * self._peak),
            "peak_bytes": peak_bytes(),
            "flops_per_token": self._flops / (self._steps * self._tokens),
        }


def peak_bytes() -> int | None:
    """The most memory that one of this process's devices has held; None where the backend does not count."""
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
    known = [peak for peak in peaks if peak is not None]
    return max(known) if known else None


def stage_ends(rows: list[Row]) -> list[int]:
    """The last step of each stage that another follows: a row is written there, for a stage ends with a validation."""
    last = {row["stage"]: row["step"] for row in rows}
    return [step for _, step in sorted(last.items())][:-1]
