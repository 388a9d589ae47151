"""Step metrics: read with a delay of one step, written to metrics.jsonl and shown in the terminal."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from ringattn.config import option
from ringattn.cost.memory import peak_bytes
from ringattn.runs.checkpoint import divergence_fix
from ringattn.runs.metrics import Row
from ringattn.runs.progress import Display
from ringattn.training.by_context import losses_by_context
from ringattn.training.optimizer import WINDOW, Skips
from ringattn.training.step import Metrics
from ringattn.units import bytes_in_words


@dataclass(frozen=True)
class LogConfig:
    """Steps to log, and constants for their rows."""

    every: int
    """Steps between rows."""
    end_step: int
    """Last step of the stage."""
    tokens_per_step: int
    peak_flops: float | None
    """Peak FLOP/s of all devices together; None if unknown."""
    token_offset: int = 0
    """Tokens after step s are token_offset + s * tokens_per_step. 0 if all stages have the same tokens per step."""
    always: tuple[int, ...] = (1,)
    """Steps that are logged regardless of `every`."""
    max_loss: float = math.inf
    """Loss above which training has diverged: see DIVERGENCE_FACTOR."""


NAMES = ("loss", "grad_norm", "learning_rate")
"""Metrics of a step that are null for a batch without unmasked targets."""

DIVERGENCE_FACTOR = 10
"""Training has diverged if the loss exceeds this many times that of a uniform guess. The parameters are then too large
to recover at a lower learning rate."""


class NonFiniteError(ValueError):
    """A loss or gradient norm that is NaN or infinite. A train step has frozen the state: see `TrainState`."""

    def __init__(self, problem: str, step: int, fix: str, *, validation: bool = False):
        """The message is `problem at step N; fix`. `validation`: it is a loss of the validation after `step`."""
        super().__init__(f"{problem} at step {step}; {fix}")
        self.problem, self.step, self.validation, self._fix = problem, step, validation, fix

    def message(self, cause: str) -> str:
        """Returns the message with the cause of the problem."""
        return f"{self.problem} at step {self.step}; {cause}; {self._fix}"


_Pending = tuple[int, Metrics | None, int]


class Recorder:
    """Reads the metrics of each step after dispatching the next step, so that devices never wait for the host."""

    def __init__(self, write: Callable[[Row], None], display: Display, config: LogConfig):
        self._write, self._display, self._config = write, display, config
        self._pending: _Pending | None = None
        self._seconds, self._steps, self._flops, self._clock = 0.0, 0, 0, time.monotonic()
        self.confirmed_step = -1
        """Last step whose state is confirmed: the step computed from it has passed `check`."""

    def step(self, step: int, metrics: Metrics | None, flops: int) -> bool:
        """Takes the metrics of `step`, which may not be computed yet, and records the metrics of the preceding step.

        `metrics` is None for a batch without unmasked targets. Returns True if there was a preceding step.
        """
        previous, self._pending = self._pending, (step, metrics, flops)
        self._record(previous)
        return previous is not None

    def flush(self) -> None:
        """Waits for the last step and records it. Raises ValueError if training has diverged."""
        previous, self._pending = self._pending, None
        self._record(previous)

    def check(self, step: int, metrics: Metrics) -> dict[str, float]:
        """Waits for the metrics of `step` and returns them. They confirm the state of the preceding step.

        Those of a skipped update do so only if they are no sign of divergence. Raises ValueError if training has
        diverged, so that no run can continue from the state of the preceding step, or if too many updates were skipped.
        """
        values = {name: float(value) for name, value in metrics._asdict().items() if name != "skips"}
        non_finite = [f"{name} became {value}" for name, value in values.items() if not math.isfinite(value)]
        problems, fix = non_finite + self._diverged(values["loss"], values["grad_norm"]), divergence_fix()
        if metrics.skips is not None:
            skips = Skips(*map(int, metrics.skips))
            values["skipped"] = skips.total
            if skips.too_many:
                count = f"{skips.in_a_row} updates in a row and {skips.in_window} of the last {WINDOW}"
                problems = [" and ".join([*problems[:1], f"optimizer.skip_spikes skipped {count}"])]
                fix += f"; or raise --{option('optimizer.skip_spikes')}"
            elif skips.in_a_row and problems:
                return values
        if non_finite:
            raise NonFiniteError(problems[0], step, fix)
        if problems:
            raise ValueError(f"{problems[0]} at step {step}; {fix}")
        self.confirmed_step = step - 1
        return values

    def _diverged(self, loss: float, grad_norm: float) -> list[str]:
        """Returns the signs of divergence in finite numbers."""
        above = f"loss became {loss:.6g}, over {DIVERGENCE_FACTOR} times that of a uniform guess"
        # Activations that overflow to 0 give the loss of a uniform guess and zero gradients.
        zero = f"loss is {loss:.6g}, but grad_norm became 0"
        return [above] * (loss > self._config.max_loss) + [zero] * (grad_norm == 0 and loss > 1e-3)

    def restart_clock(self) -> None:
        """Excludes the time since the last recorded step from the speed."""
        self._clock = time.monotonic()

    def validation(self, step: int, values: dict[str, float]) -> str:
        """Writes and prints the validation after `step`; returns it as text. Raises NonFiniteError."""
        if not all(map(math.isfinite, values.values())):
            problem = f"the validation loss became {values['eval/loss']}"
            raise NonFiniteError(problem, step, divergence_fix(), validation=True)
        self._write({"step": step} | values)
        bits = values.get("eval/bits_per_byte")
        text = f"validation loss {values['eval/loss']:.4f} nats per token"
        text += "" if bits is None else f", {bits:.4f} bits per byte"
        text += f", accuracy {values['eval/accuracy']:.1%}"
        self._display.print(f"step {step}: {text}")
        by_context = [f"{first:,}-{last:,}: {loss:.4f}" for (first, last), loss in losses_by_context(values).items()]
        if len(by_context) > 1:
            self._display.print(f"  by number of preceding tokens: {', '.join(by_context)}")
        self.restart_clock()
        return text

    def _record(self, pending: _Pending | None) -> None:
        if pending is None:
            return
        step, metrics, flops = pending
        values: Row = dict.fromkeys(NAMES) if metrics is None else {**self.check(step, metrics)}
        now = time.monotonic()
        self._seconds, self._steps, self._clock = self._seconds + now - self._clock, self._steps + 1, now
        self._flops += flops
        self._display.update(step)
        if metrics is not None and metrics.skips is not None and int(metrics.skips.in_a_row):
            numbers = f"loss {values['loss']:.4f}, grad_norm {values['grad_norm']:.4g}"
            self._display.print(f"step {step}: update skipped ({numbers}), {values['skipped']} skipped so far")
        if step in self._config.always or step % self._config.every == 0:
            finite = {name: value if value is None or math.isfinite(value) else None for name, value in values.items()}
            row = {"step": step} | finite | self._speed(step)
            self._write(row)
            self._show(row)
            self._seconds, self._steps, self._flops = 0.0, 0, 0

    def _speed(self, step: int) -> Row:
        seconds, c = self._seconds / self._steps, self._config
        return {
            "tokens": c.token_offset + step * c.tokens_per_step,
            "tokens_per_second": c.tokens_per_step / seconds,
            "step_seconds": seconds,
            "mfu": None if c.peak_flops is None else self._flops / (self._seconds * c.peak_flops),
            "peak_bytes": peak_bytes(),
            "flops_per_token": self._flops / (self._steps * c.tokens_per_step),
        }

    def _show(self, row: Row) -> None:
        step, loss = row["step"], "no unmasked targets" if row["loss"] is None else f"loss {row['loss']:.4f}"
        loss = "loss not finite" if row["loss"] is None and "skipped" in row else loss
        loss += f"  {row['skipped']} skipped" if row.get("skipped") else ""
        text = f"{loss}  {row['tokens_per_second']:,.0f} tokens/s"
        text += "" if row["mfu"] is None else f"  mfu {row['mfu']:.1%}"
        text += "" if row["peak_bytes"] is None else f"  peak {bytes_in_words(row['peak_bytes'])}"
        self._display.update(step, text)
        if not self._display.is_terminal:
            self._display.print(f"step {step}/{self._config.end_step}  {text}  {self._display.time_left(step)} left")
