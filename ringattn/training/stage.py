"""One stage of a run: data, model and jitted functions, prepared from its config."""

import math
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace

import jax
import numpy as np
from jax import NamedSharding, P

from ringattn import config
from ringattn.attn.kernels.registry import choose_kernel
from ringattn.cost.flops import step_flops
from ringattn.cost.step_statistics import Statistics, attention_statistics, memory_statistics
from ringattn.data import Batch, Loader, Splits, Tokenizer, make_loaders, prefetch, read
from ringattn.data.placement import needed_tokens, place_batch
from ringattn.mesh.axes import describe_sizes
from ringattn.model.build import model_factory
from ringattn.model.parallel import Params
from ringattn.model.scoring import Scorer, make_scorer
from ringattn.model.transformer import count_parameters
from ringattn.runs.checkpoint import Checkpoints
from ringattn.runs.reading import MismatchError
from ringattn.runs.writers import check_packages
from ringattn.training.by_context import context_ranges, named_losses, sums_by_context
from ringattn.training.optimizer import SkippingState, initial_spikes, learning_rate, optimizer
from ringattn.training.samples import sample
from ringattn.training.step import TrainState, TrainStep, abstract_state, make_initial_state, make_train_step


@dataclass(frozen=True)
class Run:
    """One stage of a run. Does not change during training."""

    full_config: config.Config
    """Config of all stages."""
    stage_number: int
    """Index of this stage, from 1."""
    config: config.Config
    """Config of this stage."""
    mesh: jax.sharding.Mesh
    tokenizer: Tokenizer
    training: Loader
    held_out: Loader
    start_step: int
    """Number of updates in earlier stages. The schedule and data of this stage start at this step."""
    end_step: int
    """Number of updates at the end of this stage."""
    earlier_tokens: int
    """Number of tokens in earlier stages."""
    initial_state: Callable[..., TrainState]
    """initial_state(params=None): the state before the first update, with random parameters or `params`."""
    train_step: TrainStep
    scorer: Scorer

    def place(self, batch: Batch) -> Batch:
        """Places a host batch [B, L] on the mesh, as [microbatches, B / microbatches, L] for the train step."""
        return place_batch(batch, self.mesh, self.config.attention.layout, self.config.train.accumulate)

    def batches(self, restored_step: int) -> Generator[Batch, None, None]:
        """Yields the remaining batches of the stage; in each process, only with the tokens that its devices need."""
        c, first, end = self.config, restored_step - self.start_step, self.end_step - self.start_step
        shape = c.train.batch_size, c.data.seq_len
        needed = needed_tokens(shape, self.mesh, c.attention.layout, c.train.accumulate)
        return prefetch(self.training, first, end, needed)

    def completes(self, step: int) -> bool:
        """Returns True if `step` is the last one of the last stage."""
        return step == self.full_config.steps_before(len(self.full_config.stages) + 1)

    @property
    def validation_batches(self) -> int:
        return _validation_batches(self.held_out, self.config)

    def validate(self, params: Params, advance: Callable[[int], None] = lambda count: None) -> dict[str, float]:
        """Returns loss (nats per token, bits per byte, by context) and accuracy on fixed held-out batches.

        Calls `advance(1)` after each batch.
        """
        count = self.validation_batches
        batches, length = [self.held_out.batch(index) for index in range(count)], self.config.data.seq_len
        nats = weight = np.zeros(len(context_ranges(length)))
        correct = 0.0
        for batch, scores in zip(batches, self.scorer(params, batches), strict=True):
            nats = nats + sums_by_context(batch.weights * scores.nats, batch.positions)
            weight = weight + sums_by_context(batch.weights, batch.positions)
            correct += float(np.sum(batch.weights, where=scores.predictions == batch.targets, dtype=np.float64))
            advance(1)
        masks = (batch.weights > 0 for batch in batches)
        text_bytes = sum(int(self.held_out.text_bytes(index)[mask].sum()) for index, mask in enumerate(masks))
        bits = {"eval/bits_per_byte": float(nats.sum()) / math.log(2) / text_bytes} if text_bytes else {}
        means = {"eval/loss": float(nats.sum() / weight.sum()), "eval/accuracy": correct / float(weight.sum())}
        return means | bits | named_losses(nats, weight, length)

    def fingerprints(self) -> dict[str, str]:
        """Returns digests of all training tokens and all validation tokens."""
        return {"training": self.training.fingerprint, "validation": self.held_out.fingerprint}

    def restore(self, checkpoints: Checkpoints) -> tuple[TrainState, list[str]]:
        """Returns the newest intact state, placed on the mesh, and a message for each damaged checkpoint."""
        like = abstract_state(self.initial_state, self.mesh, self.config.optimizer.offload)
        try:
            return checkpoints.restore(like)
        except MismatchError as error:
            try:
                return self._restore_of_other_option(checkpoints, like)
            except MismatchError:
                raise error from None

    def _restore_of_other_option(self, checkpoints: Checkpoints, like: TrainState) -> tuple[TrainState, list[str]]:
        """Returns what `restore` returns, from a checkpoint with another optimizer.skip_spikes: None, or not None."""
        expected, place = like.opt_state, NamedSharding(self.mesh, P())
        if not isinstance(expected, SkippingState):
            spikes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), initial_spikes())
            state, notes = checkpoints.restore(replace(like, opt_state=SkippingState(expected, spikes)))
            return replace(state, opt_state=state.opt_state.updates), notes
        state, notes = checkpoints.restore(replace(like, opt_state=expected.updates))
        shardings = jax.tree.map(lambda x: x.sharding, expected.spikes)
        spikes = jax.jit(initial_spikes, out_shardings=shardings)()
        return replace(state, opt_state=SkippingState(state.opt_state, spikes)), notes

    def samples(self, params: Params, after_token: Callable[[], None]) -> str:
        """Returns beginnings of a few held-out documents as text, each with the model's continuation.

        Calls `after_token` after each token of the continuations.
        """
        c = self.config
        return sample(c.model, params, self.mesh, self.tokenizer, self.held_out.batch(0), c.train.seed, after_token)


def tokens_per_step(c: config.Config) -> int:
    return c.train.batch_size * c.data.seq_len


def rebatch(splits: Splits, c: config.Config, stage_number: int) -> tuple[Loader, Loader]:
    """Returns training and validation loaders of a stage with config `c`.

    Raises ValueError: see `make_loaders`; also if all targets of the validation batches are masked out of the loss.
    """
    training, held_out = make_loaders(splits, c.data, c.train.batch_size, c.train.seed, stage_number - 1)
    if not any(held_out.batch(index).weights.any() for index in range(_validation_batches(held_out, c))):
        rule = f"validation.batches={c.validation.batches} has no unmasked targets"
        raise ValueError(f"{rule}; use more --validation.batches, or a larger --data.validation")
    return training, held_out


def _validation_batches(held_out: Loader, c: config.Config) -> int:
    """Returns the number of batches of a validation."""
    return min(c.validation.batches, held_out.rows_per_epoch // c.train.batch_size)


def prepare_stage(
    full_config: config.Config,
    mesh: jax.sharding.Mesh,
    stage_number: int = 1,
    splits: Splits | None = None,
    stage: config.Config | None = None,
) -> Run:
    """Prepares a stage, without allocating device memory. Call it under `jax.set_mesh(mesh)`.

    Reads the dataset if `splits` is None. `stage` is the config of the stage, if `full_config` leaves values open.
    """
    c, start_step = stage or full_config.stage(stage_number), full_config.steps_before(stage_number)
    check_packages(c.log)
    splits = splits or read(c.data)
    training, held_out = rebatch(splits, c, stage_number)
    tokenizer, vocabulary = splits.tokenizer, splits.tokenizer.size
    make_model = model_factory(c, vocabulary)
    update, schedule = optimizer(c.optimizer), learning_rate(c.optimizer, c.train.steps, start_step)
    earlier_stages = [full_config.stage(number) for number in range(1, stage_number)]
    return Run(
        full_config=full_config,
        stage_number=stage_number,
        config=c,
        mesh=mesh,
        tokenizer=tokenizer,
        training=training,
        held_out=held_out,
        start_step=start_step,
        end_step=start_step + c.train.steps,
        earlier_tokens=sum(stage.train.steps * tokens_per_step(stage) for stage in earlier_stages),
        initial_state=make_initial_state(make_model, update, c.optimizer.offload),
        train_step=make_train_step(make_model, vocabulary, update, schedule, c.optimizer.offload),
        scorer=make_scorer(make_model, vocabulary, mesh, c.attention.layout, c.train.accumulate),
    )


def compile_step(run: Run, state: TrainState) -> tuple[jax.stages.Compiled, Statistics]:
    """Returns the compiled train step and its statistics. `flops_per_token` is computed from the next batch."""
    c, batch = run.config, run.training.batch(int(state.step) - run.start_step)
    arrays, start_time = run.place(batch), time.monotonic()
    train_step = run.train_step.lower(state, arrays).compile()
    statistics = {
        "compile_seconds": time.monotonic() - start_time,
        "parameters": count_parameters(state.params),
        "flops_per_token": step_flops(c, run.tokenizer.size, batch) / batch.tokens.size,
        "device_bytes": memory_statistics(train_step),
        "attention": attention_statistics(c, run.mesh),
    }
    return train_step, statistics


def describe(run: Run, state: TrainState) -> Iterator[str]:
    """Yields lines that describe a run: devices, mesh, size, config."""
    c, devices = run.config, run.mesh.devices
    numbers = f"{count_parameters(state.params):,} parameters, {tokens_per_step(c):,} tokens per step"
    yield f"{devices.size} {devices.flat[0].device_kind} devices, mesh {describe_sizes(run.mesh.shape)}, {numbers}"
    yield config.summary(c)
    yield from kernel_notes(c, devices.flat[0].device_kind)


def kernel_notes(c: config.Config, device_kind: str) -> Iterator[str]:
    """Yields how attention could use a faster kernel on devices of `device_kind`."""
    shape = {"heads": c.model.heads, "kv_heads": c.model.kv_heads, "head_dim": c.model.head_dim}
    kernel = choose_kernel(c.attention.kernel, **shape, dtype=c.model.dtype, device_kind=device_kind)
    if kernel.name == "cudnn" and c.data.separate_documents:
        fix = "if each row may be one sequence, --data.separate_documents False is faster"
        yield f"cuDNN cannot keep documents separate, so attention uses the slower kernel xla; {fix}"
