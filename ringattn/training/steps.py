"""The steps of a stage: updates, validation, checkpoints, metrics, and stopping on a signal."""

import math
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax

from ringattn.cost.flops import peak_flops, step_flops
from ringattn.cost.step_statistics import describe_statistics
from ringattn.data import VideoTokenizer
from ringattn.mesh.agreement import Agreement
from ringattn.model.scoring import MAX_PENDING
from ringattn.runs.checkpoint import Checkpoints
from ringattn.runs.files import write_json, write_text, writing
from ringattn.runs.metrics import MetricsFile, Row, read_rows
from ringattn.runs.progress import Display
from ringattn.runs.signals import Stop
from ringattn.runs.watchdog import Watchdog
from ringattn.runs.writers import Writers
from ringattn.training.diagnosis import diagnosed
from ringattn.training.frames import plot_frames
from ringattn.training.optimizer import MAX_IN_A_ROW
from ringattn.training.plots import plot_loss
from ringattn.training.profile import Profile
from ringattn.training.recorder import DIVERGENCE_FACTOR, LogConfig, Recorder
from ringattn.training.stage import Run, compile_step, tokens_per_step
from ringattn.training.step import TrainState, TrainStep, skip


class Outputs(NamedTuple):
    """Receivers of everything that the steps of a stage write and report."""

    display: Display
    file: MetricsFile
    checkpoints: Checkpoints
    watchdog: Watchdog


class Ended(NamedTuple):
    """The end of the steps of a stage."""

    step: int
    """The last step."""
    signal: int
    """Number of the signal that stopped the stage; 0 if it is complete."""
    result: str
    """A summary."""


class _StoppedError(Exception):
    """Ends a validation or the samples after a signal."""

    def __init__(self, number: int):
        super().__init__()
        self.number = number
        """Number of the signal."""


def finish(run: Run, state: TrainState, directory: Path, after_token: Callable[[], None] = lambda: None) -> None:
    """Writes samples and plots of a completed run. Calls `after_token` after each token of the samples."""
    samples = run.samples(state.params, after_token)
    if jax.process_index() > 0:
        return
    with writing(directory):
        write_text(directory / "samples.txt", samples)
        if isinstance(run.tokenizer, VideoTokenizer):
            plot_frames(run.tokenizer.preview, run.tokenizer.reconstruct_preview(), directory / "plots" / "frames.png")
        # Written last: if it is missing, an error interrupted this function.
        plot_loss(read_rows(directory / "metrics.jsonl"), directory / "plots" / "loss.png", run.full_config.name)


def advance(run: Run, state: TrainState, outputs: Outputs, stop: Stop, profile: Profile) -> Ended:
    """Trains the remaining steps of a stage, saves the last state, and completes the last stage.

    A signal in one of several processes stops all of them after the same step.
    """
    display, file, checkpoints, watchdog = outputs
    c, restored_step, result = run.config, int(state.step), ""
    finding = diagnosed(run, lambda: state, display, watchdog)
    with profile, Writers(run.full_config, restored_step, display) as writers, finding:
        train_step = _compile(run, state, display)

        def write(row: Row) -> None:
            for log in (file, writers):
                log.write(row | {"stage": run.stage_number})

        recorder, agree = Recorder(write, display, _log_config(run)), Agreement()
        stop.arm()
        with display, _confirming(checkpoints, recorder), closing(run.batches(restored_step)) as batches:
            for step, batch in enumerate(batches, restored_step + 1):
                profile.before(step, recorder)
                with jax.profiler.StepTraceAnnotation("step", step_num=step):
                    has_targets = bool(batch.weights.any())
                    state, metrics = train_step(state, run.place(batch)) if has_targets else (skip(state), None)
                if recorder.step(step, metrics, step_flops(c, run.tokenizer.size, batch) if has_targets else 0):
                    watchdog.progress(f"step {step - 1}")
                profile.after(step, recorder)
                is_last, signal_number = step == run.end_step, agree(stop.number, computed=has_targets)
                to_validate = is_last or (step % c.validation.every == 0 and not signal_number)
                to_save = is_last or signal_number > 0 or step % c.checkpoint.every == 0
                if to_validate or to_save:
                    recorder.flush()
                checkpoints.confirm(recorder.confirmed_step)
                if to_validate:
                    after_batch = None if is_last else partial(_interrupt, agree, stop, MAX_PENDING + 1)
                    values, signal_number = _validate(run, state, outputs, after_batch, compiles=not result)
                    if values:
                        result = recorder.validation(step, values)
                    to_save |= signal_number > 0
                if to_save:
                    with watchdog.patient():  # it waits for the previous write
                        file.sync()
                        checkpoints.save(step, state)
                    recorder.restart_clock()
                if is_last or signal_number:
                    signal_number = signal_number or agree.now(stop.number)  # the next stage must not start
                    after_token = None if signal_number else partial(_interrupt, agree, stop, 1)
                    stopped = _conclude(run, train_step, state, outputs, recorder, after_token)
                    return Ended(step, signal_number or stopped, result)
    raise AssertionError("a stage has at least one step left")


def _interrupt(agree: Agreement, stop: Stop, ahead: int) -> None:
    """Raises _StoppedError after a signal. `ahead` is that of Agreement."""
    if number := agree(stop.number, ahead=ahead):
        raise _StoppedError(number)


def _validate(
    run: Run, state: TrainState, outputs: Outputs, after_batch: Callable[[], None] | None, *, compiles: bool
) -> tuple[dict[str, float], int]:
    """Returns the values of a validation, or {} and the number of the signal at which `after_batch` ended it."""

    def advance(count: int) -> None:
        outputs.watchdog.progress("a batch of the validation")
        advance_bar(count)
        if after_batch is not None:
            after_batch()

    with outputs.display.subtask("validation", run.validation_batches, compiles=compiles) as advance_bar:
        try:
            with outputs.watchdog.patient():
                return run.validate(state.params, advance), 0
        except _StoppedError as stopped:
            return {}, stopped.number


@contextmanager
def _confirming(checkpoints: Checkpoints, recorder: Recorder) -> Iterator[None]:
    """Confirms the checkpoints of confirmed states, also after an error: a full disk must not lose them."""
    try:
        yield
    finally:
        checkpoints.confirm(recorder.confirmed_step)


def _conclude(
    run: Run,
    train_step: TrainStep,
    state: TrainState,
    outputs: Outputs,
    recorder: Recorder,
    after_token: Callable[[], None] | None,
) -> int:
    """Completes a run that ends with `state`, and confirms `state` by a discarded extra step.

    Returns the number of the signal at which `after_token` ended the samples, or 0. Without `after_token`, does not
    complete the run. Raises ValueError if no run can resume from `state`.
    """
    subtask = outputs.display.subtask("samples, plots and checkpoint", compiles=True)
    with subtask, outputs.watchdog.patient():
        try:
            if after_token is not None and run.completes(int(state.step)):
                finish(run, state, run.config.run_directory, after_token)
        except _StoppedError as stopped:
            return stopped.number
        finally:  # nothing in `finish` must lose the last checkpoint
            _confirm(run, train_step, state, outputs, recorder)
        return 0


def _confirm(run: Run, train_step: TrainStep, state: TrainState, outputs: Outputs, recorder: Recorder) -> None:
    """Computes an extra step from `state`, which is donated. Raises ValueError if training has diverged.

    Takes the first batch with unmasked targets whose loss and gradient norm are finite, unless the optimizer stops.
    """
    step, per_epoch = int(state.step), run.training.rows_per_epoch // run.config.train.batch_size
    for number in range(step + 1, step + 1 + MAX_IN_A_ROW * (per_epoch + 1)):
        batch = run.training.batch(number - 1 - run.start_step)
        if batch.weights.any():
            state, metrics = train_step(state, run.place(batch))
            with diagnosed(run, lambda state=state: state, outputs.display, outputs.watchdog):
                recorder.check(number, metrics)
            if recorder.confirmed_step >= step:
                return
    raise ValueError("all training targets are masked out of the loss; use more data")


def _compile(run: Run, state: TrainState, display: Display) -> jax.stages.Compiled:
    """Compiles the train step; prints its statistics and writes compiled.json."""
    with display.waiting("compiling the train step"):
        train_step, statistics = compile_step(run, state)
    if jax.process_index() == 0:
        with writing(run.config.run_directory):
            write_json(run.config.run_directory / "compiled.json", statistics)
    for line in describe_statistics(statistics):
        display.print(line)
    return train_step


def _log_config(run: Run) -> LogConfig:
    tokens = tokens_per_step(run.config)
    return LogConfig(
        every=run.config.log.every,
        end_step=run.end_step,
        tokens_per_step=tokens,
        peak_flops=peak_flops(),
        token_offset=run.earlier_tokens - run.start_step * tokens,
        always=(run.start_step + 1, run.end_step),  # the plot requires rows, even for stages shorter than `every`
        max_loss=DIVERGENCE_FACTOR * math.log(run.tokenizer.size),
    )
