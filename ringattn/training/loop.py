"""A run from its config to its folder, in the order in which data flows."""

import signal
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import jax

from ringattn import config
from ringattn.data import Sides, VideoTokenizer, prefetch, read
from ringattn.mesh import check, check_same, over_all, shards, start
from ringattn.training import compiled
from ringattn.training.checkpoint import Checkpoints, saved_steps
from ringattn.training.compiled import compile_step
from ringattn.training.flops import peak_flops, step_flops
from ringattn.training.folder import check_resumable, describe_to, restore
from ringattn.training.frames import plot_frames
from ringattn.training.metrics import MetricsFile, Recorder, Row, Screen, read_rows
from ringattn.training.plots import plot_loss
from ringattn.training.profile import Profile
from ringattn.training.run import Run, describe, prepare, recut, tokens_a_step
from ringattn.training.signals import Stop, stopped_by_signal
from ringattn.training.step import TrainState
from ringattn.training.writers import Writers


def train(c: config.Config) -> int:
    """Trains all stages to their ends, from the newest checkpoint if there is one, and leaves all in the run's folder.

    Returns the process's exit status: 0, or 128 + the number of the signal that ended the run early. Raises
    ValueError, with a cure, where the config, the text, the devices or the run's folder do not fit each other, and
    if loss or gradient are no longer finite.
    """
    folder = c.folder
    check_resumable(c, folder)
    current = _current(c, folder)
    with config.said_of(c.stages, current):
        start(c.stage(current).mesh)
    text = _checked_text(c, current)
    status, begin = None, max(saved_steps(folder / "checkpoints"), default=0)
    while status is None:
        # A stage begins as a run does that was cut off: from the newest checkpoint.
        current = _current(c, folder)
        with config.said_of(c.stages, current):
            status = _train_stage(c, current, text, folder, begin)
    return status


def _current(c: config.Config, folder: Path) -> int:
    """The number of the stage that the newest checkpoint is to go on with."""
    return c.stage_after(max(saved_steps(folder / "checkpoints"), default=0))


def _checked_text(c: config.Config, current: int) -> Sides:
    """The text, read once; raises ValueError if a stage from `current` on does not fit it or the devices."""
    text, kept = None, c.folder if saved_steps(c.folder / "checkpoints") else None
    for number in range(current, len(c.stages) + 1):
        with config.said_of(c.stages, number):
            stage = c.stage(number)
            _fitting_mesh(stage)
            text = text or read(stage.data, kept)
            recut(text, stage, number)
    assert text is not None
    return text


def _fitting_mesh(stage: config.Config) -> jax.sharding.Mesh:
    mesh = over_all(stage.mesh)
    check(stage, mesh)
    return mesh


def _train_stage(c: config.Config, number: int, text: Sides, folder: Path, begin: int) -> int | None:
    """Trains stage `number` to its end; the process's exit status, or None if another stage is to come.

    `begin` is the step at which this start, all of its stages, began.
    """
    mesh = _fitting_mesh(c.stage(number))
    steps = c.steps_before(len(c.stages) + 1)
    with jax.set_mesh(mesh):
        run = prepare(c, mesh, number, text)
        check_same("config", repr(c))
        check_same("text", repr(run.fingerprints()))
        found = saved_steps(folder / "checkpoints")
        state, notes = restore(run, folder) if found else (run.initial_state(), [])
        done = int(state.step)
        screen = Screen(run.last, done)
        if done < run.first:  # the newest was damaged, and the one before it is of an earlier stage
            for line in notes:
                screen.say(line)
            return None
        for line in [*_introduced(c, run, number), *describe(run, state), *notes]:
            screen.say(line)
        if done >= run.last:
            if not (folder / "plots" / "loss.png").is_file():  # it was cut off after its last step
                finish(run, state, folder)
            more = f"to go on raise --{config.flag(c.stages, number, 'train.steps')}"
            screen.say(f"nothing to do: {folder} is at step {done} of {steps}; {more}")
            return 0
        if done:
            screen.say(f"going on from step {done} of {folder}")
        describe_to(folder, c, run)
        with (
            stopped_by_signal(screen) as stop,  # outermost: the first signal lets the last checkpoint be written
            MetricsFile(folder / "metrics.jsonl", after=done) as file,
            Checkpoints(folder / "checkpoints", c.checkpoint.keep) as checkpoints,
        ):
            profile = Profile(c.profile, begin, steps, folder / "profile", screen)
            status, state, result = advance(run, state, screen, file, checkpoints, stop, profile)
        if status == 0 and number < len(c.stages):
            if not stop.number:
                return None
            # A signal during the stage's last step is not to begin the next.
            status, name = 128 + stop.number, signal.Signals(stop.number).name
            result = f"stopped by {name} after step {run.last}, saved"
        if status == 0:
            finish(run, state, folder)
        screen.say(f"{result}; run folder {folder}")
        return status


def _introduced(c: config.Config, run: Run, number: int) -> Iterator[str]:
    if len(c.stages) > 1:
        count, ring = run.config.train.batch_size, shards(run.mesh)
        rows = f"{count} row{'s' * (count > 1)} of {run.config.data.seq_len:,} tokens"
        yield f"stage {number} of {len(c.stages)}, steps {run.first + 1} to {run.last}: {rows}, a ring of {ring}"


def finish(run: Run, state: TrainState, folder: Path) -> None:
    """What a run leaves once it has done all its steps."""
    samples = run.samples(state.params)
    if jax.process_index() == 0:
        (folder / "samples.txt").write_text(samples, encoding="utf-8")
        plot_loss(read_rows(folder / "metrics.jsonl"), folder / "plots" / "loss.png")
        if isinstance(run.tokenizer, VideoTokenizer):
            plot_frames(run.tokenizer.look, run.tokenizer.rebuilt(), folder / "plots" / "frames.png")


def advance(
    run: Run,
    state: TrainState,
    screen: Screen,
    file: MetricsFile,
    checkpoints: Checkpoints,
    stop: Stop,
    profile: Profile,
) -> tuple[int, TrainState, str]:
    """The steps that are left: the exit status, the state they end in, and what came of them in words."""
    c, begin = run.config, int(state.step)
    result = ""
    with profile, Writers(run.whole, begin, screen) as writers:
        train_step, facts = compile_step(run, state)
        compiled.write(facts, c.folder / "compiled.json")
        for line in compiled.in_words(facts):
            screen.say(line)

        def write(row: Row) -> None:
            for kept in (file, writers):
                kept.write(row | {"stage": run.number})

        tokens = tokens_a_step(c)
        before = run.tokens_before - run.first * tokens
        # However short the stage, its first and last step have rows.
        ends = run.first + 1, run.last
        recorder = Recorder(write, screen, c.log.every, tokens, peak_flops(), before, ends)
        with screen, closing(prefetch(run.rows, begin - run.first, run.last - run.first)) as batches:
            for step, batch in enumerate(batches, begin + 1):
                profile.before(step, recorder)
                with jax.profiler.StepTraceAnnotation("step", step_num=step):
                    state, metrics = train_step(state, run.on_devices(batch))
                recorder.step(step, metrics, step_flops(c, run.tokenizer.size, batch))
                profile.after(step, recorder)
                last, signal_number = step == run.last, stop.number
                to_evaluate = last or step % c.evaluate.every == 0
                to_save = last or signal_number > 0 or step % c.checkpoint.every == 0
                if to_evaluate or to_save:
                    recorder.settle()
                if to_evaluate:
                    result = recorder.evaluation(step, run.evaluate(state.params))
                if to_save:
                    file.sync()
                    checkpoints.save(state)
                if to_evaluate or to_save:
                    recorder.restart_clock()
                if signal_number and not last:
                    stopped = f"stopped by {signal.Signals(signal_number).name} after step {step}, saved"
                    return 128 + signal_number, state, stopped
    return 0, state, result
