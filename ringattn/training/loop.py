"""A run from its config to its folder, in the order in which data flows."""

import json
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import Array, P

from ringattn import Mask, attention, config, permute
from ringattn.data import Batch, Loader, Tokenizer, load, prefetch
from ringattn.environment import environment
from ringattn.mesh import CONTEXT, TOKENS, check, place, start
from ringattn.model import Params, Transformer, count_parameters
from ringattn.training.checkpoint import Checkpoints, saved_steps
from ringattn.training.metrics import MetricsFile, Recorder, Screen, ideal_seconds, plot_loss, read_rows
from ringattn.training.optimizer import learning_rate, optimizer
from ringattn.training.samples import NEW, PROMPT, NextLogits, as_text, continue_rows, make_next_logits
from ringattn.training.step import (
    EvalStep,
    TrainState,
    TrainStep,
    make_eval_step,
    make_initial_state,
    make_train_step,
)

FIXED = ("model.", "data.", "attention.window", "train.batch_size", "train.seed")
"""Fields (by prefix) that a run keeps for life: they say what its numbers mean, and which row comes next."""


@dataclass(frozen=True)
class Run:
    """What does not change while a run goes on."""

    config: config.Config
    mesh: jax.sharding.Mesh
    tokenizer: Tokenizer
    rows: Loader
    held_out: Loader
    initial_state: Callable[[], TrainState]
    train_step: TrainStep
    eval_step: EvalStep
    next_logits: NextLogits

    def on_devices(self, batch: Batch) -> Batch:
        """A host's batch [B, L] in the layout's order, as arrays [parts, B / parts, L] spread over the mesh."""
        layout, shards, parts = self.config.attention.layout, self.mesh.shape[CONTEXT], self.config.train.accumulate
        laid = jax.tree.map(lambda x: permute(x, layout, shards).reshape(parts, -1, x.shape[1]), batch)
        return place(laid, self.mesh, P(None, *TOKENS))

    def evaluate(self, params: Params) -> dict[str, float]:
        """Loss over held-out rows, always the same, in nats per token and in bits per byte of text."""
        there = self.held_out.rows_per_epoch // self.config.train.batch_size
        count = min(self.config.evaluate.batches, there)
        batches = [self.held_out.batch(number) for number in range(count)]
        # All are on their way before the first is read.
        sums = [self.eval_step(params, self.on_devices(batch)) for batch in batches]
        nats, weight = (sum(map(float, numbers)) for numbers in zip(*sums, strict=True))
        text = sum(self.tokenizer.byte_length(batch.targets[batch.weights > 0]) for batch in batches)
        bits = {"eval/bits_per_byte": nats / math.log(2) / text} if text else {}
        return {"eval/loss": nats / weight} | bits

    def fingerprints(self) -> dict[str, str]:
        """What stands for all tokens of training and of validation."""
        return {"training": self.rows.fingerprint, "validation": self.held_out.fingerprint}

    def samples(self, params: Params) -> str:
        """The beginnings of a few held-out rows, and how the model goes on."""
        layout, shards = self.config.attention.layout, self.mesh.shape[CONTEXT]

        def next_logits(rows: Batch, here: np.ndarray) -> Array:
            arrays = rows.tokens, rows.positions, rows.segment_ids, here
            return self.next_logits(params, *place([permute(x, layout, shards) for x in arrays], self.mesh, TOKENS))

        unit = 2 * shards  # fits every layout
        length = min(-(-(PROMPT + NEW) // unit) * unit, self.config.data.seq_len)
        prompt = max(length * PROMPT // (PROMPT + NEW), 1)
        rows = Batch(*(x[:, :length] for x in self.held_out.batch(0)))
        return as_text(continue_rows(rows, prompt, self.config.train.seed, next_logits), prompt, self.tokenizer)


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


def describe_to(folder: Path, run: Run) -> None:
    """Writes what the run is and what it runs on, so that it can be repeated and gone on with."""
    if jax.process_index() > 0:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Whether it resumes is said of a start, not of the run.
        config.save(replace(run.config, resume="auto"), folder / "config.json")
        files = {"environment.json": environment(), "data.json": run.fingerprints()}
        for name, content in files.items():
            (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise ValueError(f"cannot write to {folder} ({error.strerror}): choose another --log.directory") from None


def check_resumable(c: config.Config, folder: Path) -> bool:
    """Whether the run in `folder` has a checkpoint to go on from; ValueError if `c` does not allow what is there."""
    found = saved_steps(folder / "checkpoints")
    if not found:
        if c.resume == "must":
            raise ValueError(f"resume='must', but {folder} has no checkpoint: use --resume auto, or name its --name")
        return False
    if c.resume == "never":
        cure = "choose another --name, or go on from it with --resume auto"
        raise ValueError(f"resume='never', but {folder} has a checkpoint of step {found[0]}: {cure}")
    path = folder / "config.json"
    if path.is_file():
        before, now = _fields(config.load(path)), _fields(c)
        changed = [
            name for name in now if name.startswith(FIXED) and name != "model.dtype" and before[name] != now[name]
        ]
        if changed:
            name = changed[0]
            cure = f"use --{name} {before[name]}, or start anew under another --name"
            raise ValueError(f"{name}={now[name]!r}, but the run in {folder} has {before[name]!r}: {cure}")
    return True


def _fields(c: config.Config) -> dict[str, Any]:
    sections = {name: value for name, value in asdict(c).items() if isinstance(value, dict)}
    return {f"{section}.{name}": value for section, values in sections.items() for name, value in values.items()}


def prepare(c: config.Config, mesh: jax.sharding.Mesh) -> Run:
    """Text, model and steps of a run, under `jax.set_mesh(mesh)`; no device holds anything yet."""
    tokenizer, rows, held_out = load(c.data, c.train.batch_size, c.train.seed)
    mask = Mask(causal=True, window=None if c.attention.window is None else (c.attention.window, 0))
    attend = partial(attention, mask=mask, layout=c.attention.layout, strategy=c.attention.strategy)
    update, schedule = optimizer(c.optimizer, c.train.steps), learning_rate(c.optimizer, c.train.steps)

    def make_model() -> Transformer:
        return Transformer(c.model, tokenizer.size, attend, nnx.Rngs(params=c.train.seed))

    return Run(
        config=c,
        mesh=mesh,
        tokenizer=tokenizer,
        rows=rows,
        held_out=held_out,
        initial_state=make_initial_state(make_model, update),
        train_step=make_train_step(make_model, tokenizer.size, update, schedule),
        eval_step=make_eval_step(make_model, tokenizer.size),
        next_logits=make_next_logits(make_model, tokenizer.size),
    )


def restore(run: Run, folder: Path) -> tuple[TrainState, list[str]]:
    """The newest good checkpoint's state on the run's mesh, and a line about each damaged one.

    Raises ValueError if the text is not what the run was trained on.
    """
    path = folder / "data.json"
    if path.is_file() and json.loads(path.read_text(encoding="utf-8")) != run.fingerprints():
        cure = "put the text back as it was, or start anew under another --name"
        raise ValueError(f"the text of {run.config.data.path!r} is not what the run in {folder} was trained on: {cure}")

    def placed(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        spec = P() if leaf.sharding is None else leaf.sharding.spec
        sharding = jax.NamedSharding(run.mesh, spec)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    with Checkpoints(folder / "checkpoints", run.config.checkpoint.keep) as checkpoints:
        return checkpoints.restore(jax.tree.map(placed, jax.eval_shape(run.initial_state)))


def describe(run: Run, state: TrainState) -> Iterator[str]:
    c, devices = run.config, run.mesh.devices
    mesh = " x ".join(f"{name}={size}" for name, size in run.mesh.shape.items())
    numbers = f"{count_parameters(state.params):,} parameters, {c.train.batch_size * c.data.seq_len:,} tokens a step"
    yield f"{devices.size} {devices.flat[0].device_kind} devices, mesh {mesh}, {numbers}"
    yield config.summary(c)


@dataclass
class Stop:
    number: int = 0
    """The signal that asks the run to end, 0 as long as there is none."""


@contextmanager
def stopped_by_signal(screen: Screen) -> Iterator[Stop]:
    """Notes a first Ctrl-C or SIGTERM, for the loop to finish its step; a second one acts as it always does."""
    stop, usual = Stop(), {}

    def put_back() -> None:
        for number, handler in usual.items():
            signal.signal(number, handler)

    def note(number: int, frame: FrameType | None) -> None:
        stop.number = number
        put_back()
        screen.say(f"{signal.Signals(number).name}: saving after this step; once more ends it at once")

    usual.update({number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)})
    try:
        yield stop
    finally:
        put_back()


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
