"""The training state and the jitted functions that create and update it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from ringattn.data import Batch
from ringattn.mesh.axes import abstract
from ringattn.model.build import MakeModel, make_forward
from ringattn.model.loss import cross_entropy
from ringattn.model.parallel import Params
from ringattn.training.optimizer import Skips, count_skips


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything needed to resume a run. Leaves are arrays or jax.ShapeDtypeStructs."""

    params: Params
    opt_state: Any
    step: Any
    """int32 scalar: number of updates completed. Negative, ~updates, if the state is frozen.

    An update that training cannot continue from freezes the state: it and all later ones, which are dispatched before
    the host has read its metrics, change nothing. The parameters are then those that led to it.
    """


class Metrics(NamedTuple):
    """Metrics of one update: loss (nats per token), global gradient norm before clipping, learning rate.

    `skips` counts skipped updates, including this one; None if the optimizer does not skip any.
    """

    loss: Float[Array, ""]
    grad_norm: Float[Array, ""]
    learning_rate: Float[Array, ""]
    skips: Skips | None = None


TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def make_initial_state(
    make_model: MakeModel, optimizer: optax.GradientTransformation, offload: bool = False
) -> Callable[..., TrainState]:
    """Returns a jitted initial_state(params=None), sharded: no device ever holds a whole parameter.

    With `params`, which are donated, the state starts from them; without, from random parameters. With `offload`, the
    optimizer's moments are in host memory.
    """

    @partial(jax.jit, donate_argnums=0)
    def initial_state(params: Any = None) -> TrainState:
        params = nnx.split(make_model())[1] if params is None else params
        opt_state = optimizer.init(params)
        return TrainState(params, to_host(opt_state) if offload else opt_state, jnp.zeros((), jnp.int32))

    return initial_state


def abstract_state(initial_state: Callable[..., TrainState], mesh: jax.sharding.Mesh, offload: bool) -> TrainState:
    """Returns the shapes and shardings of a state of `make_initial_state`. Call it under the mesh."""
    state = abstract(jax.eval_shape(initial_state), mesh)

    def on_host(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        sharding: Any = leaf.sharding
        return leaf.update(sharding=sharding.with_memory_kind("pinned_host")) if leaf.ndim else leaf

    return replace(state, opt_state=jax.tree.map(on_host, state.opt_state)) if offload else state


def to_host(opt_state: Any) -> Any:
    """Moves the moments to host memory; inside jit. Counts stay on the device."""
    return jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Host) if x.ndim else x, opt_state)


def to_device(opt_state: Any) -> Any:
    """Reverts `to_host`."""
    return jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Device) if x.ndim else x, opt_state)


def make_loss(make_model: MakeModel, vocabulary: int) -> Callable[[Params, Batch], Float[Array, ""]]:
    """Returns loss(params, batch [B, L]) -> sum of weighted token losses, in nats."""
    forward = make_forward(make_model)

    def loss(params: Params, batch: Batch) -> Float[Array, ""]:
        hidden, output, soft_cap = forward(params, batch)
        targets, weights = jnp.asarray(batch.targets), jnp.asarray(batch.weights)
        return cross_entropy(hidden, output, targets, weights, vocabulary, soft_cap)

    return loss


def make_gradient(make_model: MakeModel, vocabulary: int) -> Callable[[Params, Batch], tuple[Float[Array, ""], Params]]:
    """Returns gradient(params, batch) -> (loss, its gradient), summed over the microbatches of [microbatches, B, L]."""
    loss_and_gradient = jax.value_and_grad(make_loss(make_model, vocabulary))

    def gradient(params: Params, batch: Batch) -> tuple[Float[Array, ""], Params]:
        def add(total, microbatch: Batch):
            return jax.tree.map(jnp.add, total, loss_and_gradient(params, microbatch)), None

        zero = jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, params)
        # Unroll a single microbatch: in a loop, XLA cannot elide adding its gradient to zero.
        return lax.scan(add, zero, batch, unroll=batch.tokens.shape[0] == 1)[0]

    return gradient


def make_train_step(
    make_model: MakeModel,
    vocabulary: int,
    optimizer: optax.GradientTransformationExtraArgs,
    schedule: optax.Schedule,
    offload: bool = False,
) -> TrainStep:
    """Returns a jitted train_step(state, batch) -> (state, metrics), which donates `state`.

    Batch arrays are [microbatches, B, L]; gradients are accumulated over microbatches sequentially. The loss is the
    weighted mean over all tokens of all microbatches, so the number of microbatches affects only memory and time. The
    batch must have unmasked targets: see `skip`. `offload` is that of `make_initial_state`. A loss or gradient norm
    that is not finite freezes the state, unless the optimizer skips the update; so do too many skipped updates.
    """
    gradient_of = make_gradient(make_model, vocabulary)

    @partial(jax.jit, donate_argnums=0)
    def train_step(state: TrainState, batch: Batch):
        batch = batch._replace(weights=batch.weights / jnp.sum(batch.weights))
        loss, gradient = gradient_of(state.params, batch)
        old_opt_state = state.opt_state
        if offload:  # after the gradient, so that moments and activations are never on the device together
            gradient, old_opt_state = lax.optimization_barrier((gradient, old_opt_state))
            old_opt_state = to_device(old_opt_state)
        with jax.numpy_dtype_promotion("standard"):  # optax requires it; tests use "strict"
            norm = optax.tree.norm(gradient)
            stop, frozen = ~(jnp.isfinite(loss) & jnp.isfinite(norm)), state.step < 0
            updates, opt_state = optimizer.update(gradient, old_opt_state, state.params, skip=stop | frozen)
            rate, skips = jnp.asarray(schedule(state.step), jnp.float32), count_skips(opt_state)
        updates = jax.tree.map(lambda update: -rate * update, updates)
        params: Any = optax.apply_updates(state.params, updates)
        opt_state = to_host(opt_state) if offload else opt_state
        stop = stop if skips is None else skips.too_many
        step = jnp.where(stop & ~frozen, ~state.step, advanced(state.step))
        return TrainState(params, opt_state, step), Metrics(loss, norm, rate, skips)

    return train_step


def advanced(step: Any) -> Any:
    """Returns the number of updates after one more; that of a frozen state does not change."""
    return step + (step >= 0).astype(jnp.int32)


def skip(state: TrainState) -> TrainState:
    """Returns the state after a batch without unmasked targets: parameters and moments are unchanged.

    The step counts all batches, so that data and learning rate do not depend on how many were skipped.
    """
    return replace(state, step=advanced(state.step))
