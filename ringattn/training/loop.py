"""The training loop: trains all stages of a config and writes the run directory."""

import math
import signal
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import jax

from ringattn import config, weights
from ringattn.cost.flops import peak_flops, step_flops
from ringattn.cost.step_statistics import describe_statistics
from ringattn.data import VideoTokenizer, prefetch
from ringattn.mesh.axes import abstract, context_shards
from ringattn.mesh.devices import start
from ringattn.mesh.processes import check_same
from ringattn.runs.checkpoint import Checkpoints, saved_steps
from ringattn.runs.directory import check_data, check_resumable, write_description
from ringattn.runs.files import write_json, write_text, writing
from ringattn.runs.metrics import MetricsFile, Row, read_rows
from ringattn.runs.progress import Display
from ringattn.runs.shared import check_shared, claimed, newest_step
from ringattn.runs.signals import Stop, stopped_by_signal
from ringattn.runs.writers import Writers
from ringattn.training.frames import plot_frames
from ringattn.training.launch import Choose, Launch, as_given, checked_mesh, prepare_launch
from ringattn.training.plots import plot_loss
from ringattn.training.profile import Profile
from ringattn.training.recorder import DIVERGENCE_FACTOR, LogConfig, Recorder
from ringattn.training.stage import Run, compile_step, describe, prepare_stage, tokens_per_step
from ringattn.training.step import TrainState, TrainStep, skip


def train(c: config.Config, choose: Choose = as_given) -> int:
    """Trains all stages, resuming from the newest checkpoint, and writes everything to the run directory.

    `choose` chooses the values that a stage leaves open (mesh.auto, attention.strategy and model.remat): see
    `planning.choose`. config.json keeps the config as given, so that a resumed run chooses again.

    Returns the exit status of the process: 0, or 128 + signal number if a signal stopped the run.

    Raises:
      ValueError: if config, data, devices and run directory are inconsistent, if another process trains the run, or
        if the loss or gradient norm becomes non-finite.
    """
    directory = c.run_directory
    with claimed([directory], c.mesh, "use another --name", "use another --log.directory"):
        check_same("config", repr(c))
        check_shared(directory)
        return _train_claimed(c, directory, choose)


def _train_claimed(c: config.Config, directory: Path, choose: Choose) -> int:
    """Trains the run in `directory`, which no other launch uses. Returns the exit status of the process."""
    launch_step = newest_step(directory)
    check_resumable(c, directory)
    current = _current_stage(c, directory)
    with config.stage_errors(c.stages, current):
        start(c.stage(current).mesh)
    launch = prepare_launch(c, current, choose)
    status = None
    while status is None:
        # Each stage starts from the newest checkpoint, like a resumed run.
        current = _current_stage(c, directory)
        with config.stage_errors(c.stages, current):
            status = _train_stage(c, current, launch, directory, launch_step)
    return status


def _current_stage(c: config.Config, directory: Path) -> int:
    """Returns the index (from 1) of the stage that continues from the newest checkpoint."""
    return c.stage_after(newest_step(directory))


def _train_stage(c: config.Config, number: int, launch: Launch, directory: Path, launch_step: int) -> int | None:
    """Trains stage `number`. Returns the exit status of the process, or None if another stage follows.

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
            return None
        for line in [*_describe_stage(run), *describe(run, state), *chosen.reasons, *damage]:
            display.print(line)
        if done >= run.end_step:
            if not (directory / "plots" / "loss.png").is_file():  # an error in `finish`, such as a full disk
                finish(run, state, directory)
            fix = f"to continue, raise --{config.flag(c.stages, number, 'train.steps')}"
            display.print(f"nothing to do: {directory} is at step {done} of {steps}; {fix}")
            return 0
        if done:
            display.print(f"resuming from step {done} of {directory}")
        write_description(directory, c, run.fingerprints(), run.tokenizer.files | (origin.chat_files if origin else {}))
        with (
            stopped_by_signal(display.print) as stop,  # outermost: exiting Checkpoints waits for the last write
            MetricsFile(directory / "metrics.jsonl", after=done) as file,
            Checkpoints(directory / "checkpoints", c.checkpoint.keep) as checkpoints,
        ):
            profile = Profile(c.profile, launch_step, steps, directory / "profile", display)
            status, result = advance(run, state, display, file, checkpoints, stop, profile)
        if status == 0 and number < len(c.stages):
            if not stop.number:
                return None
            # After a signal in a stage's last step, the next stage must not start.
            status, name = 128 + stop.number, signal.Signals(stop.number).name
            result = f"stopped by {name} after step {run.end_step}; checkpoint saved"
        display.print(f"{result}; run directory {directory}")
        return status


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


def finish(run: Run, state: TrainState, directory: Path) -> None:
    """Writes samples and plots of a completed run."""
    samples = run.samples(state.params)
    if jax.process_index() > 0:
        return
    with writing(directory):
        write_text(directory / "samples.txt", samples)
        if isinstance(run.tokenizer, VideoTokenizer):
            plot_frames(run.tokenizer.preview, run.tokenizer.reconstruct_preview(), directory / "plots" / "frames.png")
        # Written last: if it is missing, an error interrupted this function.
        plot_loss(read_rows(directory / "metrics.jsonl"), directory / "plots" / "loss.png", run.full_config.name)


def advance(
    run: Run,
    state: TrainState,
    display: Display,
    file: MetricsFile,
    checkpoints: Checkpoints,
    stop: Stop,
    profile: Profile,
) -> tuple[int, str]:
    """Trains the remaining steps and completes the last stage. Returns the exit status and a summary of the result."""
    c, restored_step, result = run.config, int(state.step), ""
    with profile, Writers(run.full_config, restored_step, display) as writers:
        train_step = _compile(run, state, display)

        def write(row: Row) -> None:
            for log in (file, writers):
                log.write(row | {"stage": run.stage_number})

        recorder = Recorder(write, display, _log_config(run))
        first, end = restored_step - run.start_step, run.end_step - run.start_step
        stop.arm()
        with display, _confirming(checkpoints, recorder), closing(prefetch(run.training, first, end)) as batches:
            for step, batch in enumerate(batches, restored_step + 1):
                profile.before(step, recorder)
                with jax.profiler.StepTraceAnnotation("step", step_num=step):
                    has_targets = batch.weights.any()
                    state, metrics = train_step(state, run.place(batch)) if has_targets else (skip(state), None)
                recorder.step(step, metrics, step_flops(c, run.tokenizer.size, batch) if has_targets else 0)
                profile.after(step, recorder)
                is_last, signal_number = step == run.end_step, stop.number
                to_validate = is_last or step % c.validation.every == 0
                to_save = is_last or signal_number > 0 or step % c.checkpoint.every == 0
                if to_validate or to_save:
                    recorder.flush()
                checkpoints.confirm(recorder.confirmed_step)
                if to_validate:
                    with display.subtask("validation", run.validation_batches, compiles=not result) as advance_bar:
                        values = run.validate(state.params, advance_bar)
                    result = recorder.validation(step, values)
                if to_save:
                    file.sync()
                    checkpoints.save(step, state)
                if to_validate or to_save:
                    recorder.restart_clock()
                if is_last or signal_number:
                    _conclude(run, train_step, state, display, recorder)
                if signal_number and not is_last:
                    stopped = f"stopped by {signal.Signals(signal_number).name} after step {step}; checkpoint saved"
                    return 128 + signal_number, stopped
    return 0, result


@contextmanager
def _confirming(checkpoints: Checkpoints, recorder: Recorder) -> Iterator[None]:
    """Confirms the checkpoints of confirmed states, also after an error: a full disk must not lose them."""
    try:
        yield
    finally:
        checkpoints.confirm(recorder.confirmed_step)


def _conclude(run: Run, train_step: TrainStep, state: TrainState, display: Display, recorder: Recorder) -> None:
    """Completes a run that ends with `state`, and confirms `state` by a discarded extra step.

    Raises ValueError if no run can resume from `state`.
    """
    with display.subtask("samples, plots and checkpoint", compiles=True):
        try:
            if int(state.step) == run.full_config.steps_before(len(run.full_config.stages) + 1):
                finish(run, state, run.config.run_directory)
        finally:  # an error in `finish` must not lose the last checkpoint
            _confirm(run, train_step, state, recorder)


def _confirm(run: Run, train_step: TrainStep, state: TrainState, recorder: Recorder) -> None:
    """Computes an extra step from `state`, which is donated. Raises ValueError if training has diverged."""
    step, per_epoch = int(state.step), run.training.rows_per_epoch // run.config.train.batch_size
    start = step - run.start_step
    batches = map(run.training.batch, range(start, start + per_epoch + 1))
    batch = next((batch for batch in batches if batch.weights.any()), None)
    if batch is None:
        raise ValueError("all training targets are masked out of the loss; use more data")
    recorder.check(step + 1, train_step(state, run.place(batch))[1])


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
