"""The training loop: trains all stages of a config and writes the run directory."""

import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import jax

from ringattn import config, weights
from ringattn.mesh.axes import abstract, context_shards
from ringattn.mesh.devices import start
from ringattn.mesh.processes import check_same, gather
from ringattn.runs.checkpoint import Checkpoints, UnwritableError, saved_steps
from ringattn.runs.directory import check_data, check_resumable, write_description
from ringattn.runs.metrics import MetricsFile
from ringattn.runs.progress import Display
from ringattn.runs.shared import check_shared, claimed, newest_step
from ringattn.runs.signals import stopped_by_signal
from ringattn.runs.watchdog import watched
from ringattn.training.launch import Choose, Launch, as_given, checked_mesh, prepare_launch
from ringattn.training.profile import Profile
from ringattn.training.stage import Run, describe, prepare_stage
from ringattn.training.step import TrainState
from ringattn.training.steps import Ended, Outputs, advance, finish

NOT_SAVED = 1
"""Exit status of a run that ended as it should, but could not write a checkpoint or metrics."""


def train(c: config.Config, choose: Choose = as_given) -> int:
    """Trains all stages, resuming from the newest checkpoint, and writes everything to the run directory.

    `choose` chooses the values that a stage leaves open (mesh.auto, attention.strategy and model.remat): see
    `planning.choose`. config.json keeps the config as given, so that a resumed run chooses again.

    Returns the exit status of the process: 0, NOT_SAVED, or 128 + signal number if a signal stopped the run.

    Raises:
      ValueError: if config, data, devices and run directory are inconsistent, if another process trains the run, or
        if the loss or gradient norm becomes non-finite.
    """
    directory = c.run_directory
    with claimed([directory], c.mesh, "use another --name", "use another --log.directory"):
        check_same("config", repr(c))
        check_shared(directory)
        try:
            return _train_claimed(c, directory, choose)
        except UnwritableError as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(NOT_SAVED) from None


def _train_claimed(c: config.Config, directory: Path, choose: Choose) -> int:
    """Trains the run in `directory`, which no other launch uses. Returns the exit status of the process."""
    launch_step = newest_step(directory)
    check_resumable(c, directory)
    current = _current_stage(c, directory)
    with config.stage_errors(c.stages, current):
        start(c.stage(current).mesh)
    launch = prepare_launch(c, current, choose)
    status, failures = None, 0
    while status is None:
        # Each stage starts from the newest checkpoint, like a resumed run.
        current = _current_stage(c, directory)
        with config.stage_errors(c.stages, current):
            status, failed = _train_stage(c, current, launch, directory, launch_step)
        failures += failed
    return status or NOT_SAVED * (failures > 0)


def _current_stage(c: config.Config, directory: Path) -> int:
    """Returns the index (from 1) of the stage that continues from the newest checkpoint."""
    return c.stage_after(newest_step(directory))


def _train_stage(
    c: config.Config, number: int, launch: Launch, directory: Path, launch_step: int
) -> tuple[int | None, int]:
    """Trains stage `number`. Returns the exit status of the process, or None if another stage follows.

    Also returns the number of checkpoints and rows of metrics that could not be written.

    `launch_step` is the step at which this launch, with all its stages, started.
    """
    chosen, origin = launch.stage(number), launch.origin
    mesh = checked_mesh(chosen.config)
    steps = c.steps_before(len(c.stages) + 1)
    with jax.set_mesh(mesh):
        run = prepare_stage(c, mesh, number, launch.splits, chosen.config)
        check_same("data", repr(run.fingerprints()))
        state, damage = _initial_or_restored(run, directory, origin)
        done = int(state.step)
        display = Display(run.end_step, done)
        if done < run.start_step:  # the newest checkpoint was damaged, and the restored one is from an earlier stage
            for line in damage:
                display.print(line)
            return None, 0
        for line in [*_describe_stage(run), *describe(run, state), *chosen.reasons, *damage]:
            display.print(line)
        if done >= run.end_step:
            if not (directory / "plots" / "loss.png").is_file():  # an error in `finish`, such as a full disk
                finish(run, state, directory)
            fix = f"to continue, raise --{config.flag(c.stages, number, 'train.steps')}"
            display.print(f"nothing to do: {directory} is at step {done} of {steps}; {fix}")
            return 0, 0
        if done:
            display.print(f"resuming from step {done} of {directory}")
        write_description(directory, c, run.fingerprints(), run.tokenizer.files | (origin.chat_files if origin else {}))
        with (
            stopped_by_signal(display.print) as stop,  # outermost: exiting Checkpoints waits for the last write
            watched(directory / f"hang-{jax.process_index()}.txt") as watchdog,
            MetricsFile(directory / "metrics.jsonl", done, display.print) as file,
            Checkpoints(directory / "checkpoints", c.checkpoint.keep, display.print, verified=done) as checkpoints,
            watchdog.patient_after(),
        ):
            profile = Profile(c.profile, launch_step, steps, directory / "profile", display)
            ended = advance(run, state, Outputs(display, file, checkpoints, watchdog), stop, profile)
        failures = checkpoints.failures + int(gather(str(file.lost))[0])  # only process 0 writes the file
        return _status(run, ended, directory, display), failures


def _status(run: Run, ended: Ended, directory: Path, display: Display) -> int | None:
    """Reports the end of a stage. Returns the exit status of the process, or None if another stage follows."""
    newest = newest_step(directory)
    saved = "checkpoint saved" if newest == ended.step else f"the newest checkpoint is of step {newest}"
    if ended.signal:
        name = signal.Signals(ended.signal).name
        display.print(f"stopped by {name} after step {ended.step}; {saved}; run directory {directory}")
    elif newest < ended.step:
        display.print(f"{ended.result}; step {ended.step} is not saved: {saved}; run directory {directory}")
    elif run.completes(ended.step):
        display.print(f"{ended.result}; run directory {directory}")
    else:
        return None
    if newest < ended.step:
        return NOT_SAVED
    return 128 + ended.signal if ended.signal else 0


def _initial_or_restored(run: Run, directory: Path, origin: weights.Origin | None) -> tuple[TrainState, list[str]]:
    """Returns the initial or restored state, and notes, such as one for each damaged checkpoint.

    Raises ValueError if the data has changed.
    """
    if not saved_steps(directory / "checkpoints"):
        if origin is None:
            return run.initial_state(), []
        like = abstract(jax.eval_shape(run.initial_state).params, run.mesh)
        with Display(None).waiting(f"reading {origin.path}"):
            return run.initial_state(origin.read(like)), []
    notes = check_data(directory, run.fingerprints(), run.config.data.path)
    with Checkpoints(directory / "checkpoints", run.config.checkpoint.keep) as checkpoints:
        state, damage = run.restore(checkpoints)
    return state, [*notes, *damage]


def _describe_stage(run: Run) -> Iterator[str]:
    stages = len(run.full_config.stages)
    if stages > 1:
        size, shards = run.config.train.batch_size, context_shards(run.mesh)
        rows = f"{size} row{'s' * (size > 1)} of {run.config.data.seq_len:,} tokens, {shards} devices per row"
        yield f"stage {run.stage_number} of {stages}, steps {run.start_step + 1} to {run.end_step}: {rows}"
