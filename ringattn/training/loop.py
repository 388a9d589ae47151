"""A run from its config to its folder, in the order in which data flows."""

import signal
import time
from contextlib import closing
from pathlib import Path

import jax

from ringattn import config
from ringattn.data import VideoTokenizer, prefetch
from ringattn.mesh import check, start
from ringattn.model import count_parameters
from ringattn.training.checkpoint import Checkpoints
from ringattn.training.folder import check_resumable, describe_to, restore
from ringattn.training.frames import plot_frames
from ringattn.training.metrics import MetricsFile, Recorder, Screen, ideal_seconds, plot_loss, read_rows
from ringattn.training.run import Run, describe, prepare
from ringattn.training.signals import Stop, stopped_by_signal
from ringattn.training.step import TrainState


def train(c: config.Config) -> int:
    """Trains until `c.train.steps`, from the newest checkpoint if there is one, and leaves all in the run's folder.

    Returns the process's exit status: 0, or 128 + the number of the signal that ended the run early. Raises
    ValueError, with a cure, where the config, the text, the devices or the run's folder do not fit each other, and
    if loss or gradient are no longer finite.
    """
    mesh = start(c.mesh)
    check(c, mesh)
    folder = Path(c.log.directory) / c.name
    found = check_resumable(c, folder)
    with jax.set_mesh(mesh):
        run = prepare(c, mesh)
        state, notes = restore(run, folder) if found else (run.initial_state(), [])
        done = int(state.step)
        screen = Screen(c.train.steps, done)
        for line in [*describe(run, state), *notes]:
            screen.say(line)
        if done >= c.train.steps:
            if not (folder / "plots" / "loss.png").is_file():  # it was cut off after its last step
                finish(run, state, folder)
            screen.say(f"nothing to do: {folder} is at step {done} of {c.train.steps}; to go on raise --train.steps")
            return 0
        if done:
            screen.say(f"going on from step {done} of {folder}")
        describe_to(folder, run)
        with (
            stopped_by_signal(screen) as stop,  # outermost: the first signal lets the last checkpoint be written
            MetricsFile(folder / "metrics.jsonl", after=done) as file,
            Checkpoints(folder / "checkpoints", c.checkpoint.keep) as checkpoints,
        ):
            status, state, result = advance(run, state, screen, file, checkpoints, stop)
        if status == 0:
            finish(run, state, folder)
        screen.say(f"{result}; run folder {folder}")
        return status


def finish(run: Run, state: TrainState, folder: Path) -> None:
    """What a run leaves once it has done all its steps."""
    samples = run.samples(state.params)
    if jax.process_index() == 0:
        (folder / "samples.txt").write_text(samples, encoding="utf-8")
        plot_loss(read_rows(folder / "metrics.jsonl"), folder / "plots" / "loss.png")
        if isinstance(run.tokenizer, VideoTokenizer):
            plot_frames(run.tokenizer.look, run.tokenizer.rebuilt(), folder / "plots" / "frames.png")


def advance(
    run: Run, state: TrainState, screen: Screen, file: MetricsFile, checkpoints: Checkpoints, stop: Stop
) -> tuple[int, TrainState, str]:
    """The steps that are left: the exit status, the state they end in, and what came of them in words."""
    c, begin, began = run.config, int(state.step), time.monotonic()
    train_step = run.train_step.lower(state, run.on_devices(run.rows.batch(begin))).compile()
    screen.say(f"compiled in {time.monotonic() - began:.1f} s")
    looked_up = 0 if c.model.tied else state.params["embedding"][...].size
    ideal = ideal_seconds(c, count_parameters(state.params) - looked_up)
    recorder = Recorder(file, screen, c.log.every, c.train.batch_size * c.data.seq_len, ideal)
    result = ""
    with screen, closing(prefetch(run.rows, begin, c.train.steps)) as batches:
        for step, batch in enumerate(batches, begin + 1):
            state, metrics = train_step(state, run.on_devices(batch))
            recorder.step(step, metrics)
            last, signal_number = step == c.train.steps, stop.number
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
