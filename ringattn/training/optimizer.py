"""AdamW with gradient clipping, linear warmup and cosine decay, which may skip updates of spikes."""

import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from ringattn import config
from ringattn.model.parallel import Params

WINDOW = 100
"""Number of updates over which `skip_spikes` averages gradient norms and limits the number of skipped updates."""
MIN_NORMS = 10
"""Number of gradient norms in the mean before a norm above it counts as a spike."""
MAX_IN_A_ROW, MAX_IN_WINDOW = 5, 20
"""Maximum number of skipped updates in a row, and of the last WINDOW."""
NO_UPDATE, SKIPPED = -1.0, -2.0
"""Take the place of gradient norms. They are finite, because checkpoints are."""


def learning_rate(c: config.Optimizer, steps: int, start_step: int = 0) -> optax.Schedule:
    """Returns a schedule of `steps` updates from `start_step`: linear warmup to the peak, then cosine decay."""
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=c.learning_rate / (c.warmup_steps + 1),  # not 0, so that the first update has an effect
        peak_value=c.learning_rate,
        warmup_steps=c.warmup_steps,
        decay_steps=max(steps, c.warmup_steps + 1),  # optax requires a decay, also if the run ends during warmup
        end_value=c.learning_rate * c.final_fraction,
    )
    return lambda count: schedule(count - start_step)


def _weight_decay_mask(params: Params) -> Params:
    """Returns True for matrices and False for norm scales and biases, whose stacked layers have 2 or 3 dims."""

    def is_matrix(path: Any, _: Any) -> bool:
        return not re.search("scale|bias", jax.tree_util.keystr(path))

    return jax.tree_util.tree_map_with_path(is_matrix, params)


class Spikes(NamedTuple):
    """The history of `skip_spikes`, which checkpoints contain, so that a resumed run skips the same updates."""

    norms: Float[Array, " window"]
    """float32: gradient norms of the last WINDOW updates, newest last, or NO_UPDATE, or SKIPPED."""
    total: Int[Array, ""]
    """int32: number of skipped updates of the run."""


def initial_spikes() -> Spikes:
    return Spikes(jnp.full(WINDOW, NO_UPDATE, jnp.float32), jnp.zeros((), jnp.int32))


class SkippingState(NamedTuple):
    """The state of an optimizer that skips spikes."""

    updates: optax.OptState
    """The state after the updates that were not skipped."""
    spikes: Spikes


class Skips(NamedTuple):
    """Numbers of skipped updates. Arrays in the train step, ints on the host."""

    total: Any
    in_a_row: Any
    """Number of skipped updates since the last one that was not: 0 unless the newest is skipped."""
    in_window: Any
    """Number of skipped updates of the last WINDOW."""

    @property
    def too_many(self) -> Any:
        """True if training must stop: skipping does not help."""
        return (self.in_a_row >= MAX_IN_A_ROW) | (self.in_window >= MAX_IN_WINDOW)


def count_skips(opt_state: optax.OptState) -> Skips | None:
    """Returns the numbers of skipped updates; None if the optimizer does not skip any."""
    if not isinstance(opt_state, SkippingState):
        return None
    skipped = (opt_state.spikes.norms == SKIPPED).astype(jnp.int32)
    return Skips(opt_state.spikes.total, jnp.sum(jnp.cumprod(skipped[::-1])), jnp.sum(skipped))


def skip_spikes(update: optax.GradientTransformationExtraArgs, factor: float) -> optax.GradientTransformationExtraArgs:
    """Returns `update` that also skips updates whose gradient norm exceeds `factor` times the mean of the last ones.

    The mean is that of the last WINDOW updates, without skipped ones. The caller must stop training if `count_skips`
    finds too many.
    """

    def init(params: Params) -> SkippingState:
        return SkippingState(update.init(params), initial_spikes())

    def skip_or_update(
        updates: Params, state: Any, params: Params = None, *, skip: Any = False, **_: Any
    ) -> tuple[Params, SkippingState]:
        norm, (norms, total) = optax.tree.norm(updates), state.spikes
        number = jnp.sum(norms >= 0)
        mean = jnp.sum(norms, where=norms >= 0) / jnp.maximum(number, 1)
        skip = skip | ((number >= MIN_NORMS) & (norm > factor * mean))
        norms = jnp.append(norms[1:], jnp.where(skip, SKIPPED, norm))
        updates, updated = update.update(updates, state.updates, params, skip=skip)
        return updates, SkippingState(updated, Spikes(norms, total + skip))

    return optax.GradientTransformationExtraArgs(init, skip_or_update)


def _scale_by_adam(b1: float, b2: float, epsilon: float = 1e-8) -> optax.GradientTransformationExtraArgs:
    """Returns optax.scale_by_adam with an argument `skip`: if True, the state does not change.

    The updates are computed from the moments that remain, so they are finite.
    """

    def update(
        updates: Params, state: Any, params: Params = None, *, skip: Any = False, **_: Any
    ) -> tuple[Params, optax.ScaleByAdamState]:
        def kept(old: Params, new: Params) -> Params:
            return jax.tree.map(lambda old, new: jnp.where(skip, old, new), old, new)

        mean = kept(state.mu, optax.tree.update_moment(updates, state.mu, b1, 1))
        square = kept(state.nu, optax.tree.update_moment_per_elem_norm(updates, state.nu, b2, 2))
        count = jnp.where(skip, state.count, optax.safe_increment(state.count))
        positive = jnp.maximum(count, 1)  # if the first update is skipped
        corrected = (optax.tree.bias_correction(x, b, positive) for x, b in ((mean, b1), (square, b2)))
        updates = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + epsilon), *corrected)
        return updates, optax.ScaleByAdamState(count, mean, square)

    return optax.GradientTransformationExtraArgs(optax.scale_by_adam(b1, b2).init, update)


def _zero_if_skipped() -> optax.GradientTransformationExtraArgs:
    """Returns a transformation whose updates, which must be finite, become 0 if its argument `skip` is True.

    With jnp.where instead of a factor, the TPU compiler copies embedding tables to another layout for the update: 0.4
    GB per device more for 8B parameters on v5e:8x8.
    """

    def update(updates: Params, state: Any, params: Params = None, *, skip: Any = False, **_: Any):
        factor = jnp.where(skip, 0.0, 1.0)
        return jax.tree.map(lambda x: factor * x, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def optimizer(c: config.Optimizer) -> optax.GradientTransformationExtraArgs:
    """Returns clipping by global norm, followed by AdamW (arXiv 1711.05101) with weight decay on matrices only.

    The train step multiplies its updates by -learning_rate. The optimizer counts only updates; a run's schedule counts
    all steps. With the argument `skip`, updates are 0 and the state does not change. With `c.skip_spikes`, the
    optimizer also skips spikes, and its state is a SkippingState, which counts all skipped updates.
    """
    update = optax.chain(
        optax.clip_by_global_norm(c.clip_norm),
        _scale_by_adam(c.beta1, c.beta2),
        optax.add_decayed_weights(c.weight_decay, _weight_decay_mask),
        _zero_if_skipped(),
    )
    return update if c.skip_spikes is None else skip_spikes(update, c.skip_spikes)
