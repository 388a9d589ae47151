"""A run: all that follows from its config, and does not change while it goes on."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import jax
import numpy as np
from flax import nnx
from jax import Array

from ringattn import Mask, attention, config, permute
from ringattn.data import Batch, Loader, Sides, Tokenizer, deal, read
from ringattn.mesh import SEQUENCE, TOKENS, in_words, place, shards
from ringattn.model import Params, Transformer, count_parameters
from ringattn.training.by_context import context_ranges, named_losses, sums_by_context
from ringattn.training.optimizer import learning_rate, optimizer
from ringattn.training.samples import NEW, PROMPT, NextLogits, as_text, continue_rows, make_next_logits
from ringattn.training.score import Scorer, make_scorer, on_devices
from ringattn.training.step import (
    MakeModel,
    TrainState,
    TrainStep,
    make_initial_state,
    make_train_step,
)
from ringattn.training.writers import check_packages


@dataclass(frozen=True)
class Run:
    """What does not change while a run, or a stage of it, goes on."""

    whole: config.Config
    """Of all stages."""
    number: int
    """This stage's, from 1."""
    config: config.Config
    """This stage's."""
    mesh: jax.sharding.Mesh
    tokenizer: Tokenizer
    rows: Loader
    held_out: Loader
    first: int
    """Updates of the stages before this one: where its schedule and its rows begin."""
    last: int
    """Updates that are done when it ends."""
    tokens_before: int
    """Tokens of the stages before this one."""
    initial_state: Callable[[], TrainState]
    train_step: TrainStep
    scorer: Scorer
    next_logits: NextLogits

    def on_devices(self, batch: Batch) -> Batch:
        """A host's batch [B, L] as the update takes it: arrays [parts, B / parts, L]."""
        return on_devices(batch, self.mesh, self.config.attention.layout, self.config.train.accumulate)

    def evaluate(self, params: Params) -> dict[str, float]:
        """Loss over held-out rows, always the same: of all, in nats per token and bits per byte, and by context.

        Beside it the share of the tokens that the model would have said itself.
        """
        there = self.held_out.rows_per_epoch // self.config.train.batch_size
        count = min(self.config.evaluate.batches, there)
        batches, length = [self.held_out.batch(number) for number in range(count)], self.config.data.seq_len
        nats = weight = np.zeros(len(context_ranges(length)))
        right = 0.0
        for batch, scores in zip(batches, self.scorer(params, batches), strict=True):
            nats = nats + sums_by_context(batch.weights * scores.nats, batch.positions)
            weight = weight + sums_by_context(batch.weights, batch.positions)
            right += float(np.sum(batch.weights, where=scores.best == batch.targets, dtype=np.float64))
        if not weight.any():
            cure = "use more --evaluate.batches, or a larger --data.validation"
            raise ValueError(f"the validation's first {count} batches are all prompt, with nothing to learn: {cure}")
        text = sum(self.tokenizer.byte_length(batch.targets[batch.weights > 0]) for batch in batches)
        bits = {"eval/bits_per_byte": float(nats.sum()) / math.log(2) / text} if text else {}
        means = {"eval/loss": float(nats.sum() / weight.sum()), "eval/accuracy": right / float(weight.sum())}
        return means | bits | named_losses(nats, weight, length)

    def fingerprints(self) -> dict[str, str]:
        """What stands for all tokens of training and of validation."""
        return {"training": self.rows.fingerprint, "validation": self.held_out.fingerprint}

    def samples(self, params: Params) -> str:
        """The beginnings of a few held-out rows, and how the model goes on."""
        layout, size = self.config.attention.layout, shards(self.mesh)

        def next_logits(rows: Batch, here: np.ndarray) -> Array:
            arrays = rows.tokens, rows.positions, rows.segment_ids, here
            return self.next_logits(params, *place([permute(x, layout, size) for x in arrays], self.mesh, TOKENS))

        unit = 2 * size  # fits every layout
        length = min(-(-(PROMPT + NEW) // unit) * unit, self.config.data.seq_len)
        prompt = max(length * PROMPT // (PROMPT + NEW), 1)
        rows = Batch(*(x[:, :length] for x in self.held_out.batch(0)))
        return as_text(continue_rows(rows, prompt, self.config.train.seed, next_logits), prompt, self.tokenizer)


def tokens_a_step(c: config.Config) -> int:
    return c.train.batch_size * c.data.seq_len


def recut(text: Sides, c: config.Config, number: int) -> tuple[Loader, Loader]:
    """Training's and validation's rows of stage `number`, whose config is `c`. Raises ValueError as `deal` does."""
    return deal(text, c.data, c.train.batch_size, c.train.seed, number - 1)


def prepare(whole: config.Config, mesh: jax.sharding.Mesh, number: int = 1, text: Sides | None = None) -> Run:
    """Sides, model and steps of stage `number`, under `jax.set_mesh(mesh)`; no device holds anything yet.

    `text` is that of any stage, where it has been read before.
    """
    c, first = whole.stage(number), whole.steps_before(number)
    check_packages(c.log)
    text = text or read(c.data)
    rows, held_out = recut(text, c, number)
    tokenizer, vocabulary = text.tokenizer, text.tokenizer.size
    make_model = model_of(c, vocabulary)
    rate = c.optimizer, c.train.steps, first
    update, schedule = optimizer(*rate), learning_rate(*rate)
    return Run(
        whole=whole,
        number=number,
        config=c,
        mesh=mesh,
        tokenizer=tokenizer,
        rows=rows,
        held_out=held_out,
        first=first,
        last=first + c.train.steps,
        tokens_before=sum(each.train.steps * tokens_a_step(each) for each in map(whole.stage, range(1, number))),
        initial_state=make_initial_state(make_model, update),
        train_step=make_train_step(make_model, vocabulary, update, schedule),
        scorer=make_scorer(make_model, vocabulary, mesh, c.attention.layout, c.train.accumulate),
        next_logits=make_next_logits(make_model, vocabulary),
    )


def mask_of(c: config.Config) -> Mask:
    return Mask(causal=True, window=None if c.attention.window is None else (c.attention.window, 0))


def model_of(c: config.Config, vocabulary: int) -> MakeModel:
    """The model of a run whose tokenizer has `vocabulary` ids; ValueError if it was to have fewer."""
    rows = vocabulary if c.model.vocabulary is None else c.model.vocabulary
    if rows < vocabulary:
        raise ValueError(f"model.vocabulary={rows}, but the tokenizer has {vocabulary} ids: use {vocabulary}, or None")
    attend = partial(
        attention, mask=mask_of(c), axis=SEQUENCE, layout=c.attention.layout, strategy=c.attention.strategy
    )

    def make_model() -> Transformer:
        return Transformer(c.model, rows, attend, nnx.Rngs(params=c.train.seed))

    return make_model


def describe(run: Run, state: TrainState) -> Iterator[str]:
    c, devices = run.config, run.mesh.devices
    numbers = f"{count_parameters(state.params):,} parameters, {tokens_a_step(c):,} tokens a step"
    yield f"{devices.size} {devices.flat[0].device_kind} devices, mesh {in_words(run.mesh.shape)}, {numbers}"
    yield config.summary(c)
