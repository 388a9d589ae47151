"""A run: all that follows from its config, and does not change while it goes on."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jax import Array, P

from ringattn import Mask, attention, config, permute
from ringattn.data import Batch, Loader, Tokenizer, load
from ringattn.mesh import CONTEXT, TOKENS, place
from ringattn.model import Params, Transformer, count_parameters
from ringattn.training.checkpoint import saved_steps
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


def prepare(c: config.Config, mesh: jax.sharding.Mesh) -> Run:
    """Text, model and steps of a run, under `jax.set_mesh(mesh)`; no device holds anything yet."""
    folder = Path(c.log.directory) / c.name
    kept = folder if saved_steps(folder / "checkpoints") else None
    tokenizer, rows, held_out = load(c.data, c.train.batch_size, c.train.seed, kept)
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


def describe(run: Run, state: TrainState) -> Iterator[str]:
    c, devices = run.config, run.mesh.devices
    mesh = " x ".join(f"{name}={size}" for name, size in run.mesh.shape.items())
    numbers = f"{count_parameters(state.params):,} parameters, {c.train.batch_size * c.data.seq_len:,} tokens a step"
    yield f"{devices.size} {devices.flat[0].device_kind} devices, mesh {mesh}, {numbers}"
    yield config.summary(c)
