"""The state of a training run and the jitted functions that make and change it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from ringattn.data import Batch
from ringattn.model import Params, Transformer
from ringattn.training.loss import cross_entropy


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """All that a run needs in order to go on. Its leaves are arrays, or what stands for them in a tree of shapes."""

    params: Params
    opt_state: Any
    step: Any
    """int32 scalar: the updates done."""


class Metrics(NamedTuple):
    """Of one update: the loss before it, in nats per token, the gradient's global norm before clipping, the rate."""

    loss: Float[Array, ""]
    grad_norm: Float[Array, ""]
    learning_rate: Float[Array, ""]


MakeModel = Callable[[], Transformer]
TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def make_initial_state(make_model: MakeModel, optimizer: optax.GradientTransformation) -> Callable[[], TrainState]:
    """A jitted function that makes the state of step 0, each array in the pieces in which it will lie."""

    @jax.jit
    def initial_state() -> TrainState:
        _, params = nnx.split(make_model())
        return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))

    return initial_state


def make_forward(make_model: MakeModel) -> Callable[[Params, Batch], tuple[Float[Array, "B L E"], Float[Array, "V E"]]]:
    """Parameters and a batch [B, L] -> hidden states and the output projection, as the losses take them."""
    graphdef = nnx.graphdef(nnx.eval_shape(make_model))

    def forward(params: Params, batch: Batch):
        model = nnx.merge(graphdef, params)
        return model(*map(jnp.asarray, (batch.tokens, batch.positions, batch.segment_ids))), model.output()

    return forward


def make_loss(make_model: MakeModel, vocabulary: int) -> Callable[[Params, Batch], Float[Array, ""]]:
    """Parameters and a batch [B, L] -> the sum of its weighted losses, in nats."""
    forward = make_forward(make_model)

    def loss(params: Params, batch: Batch) -> Float[Array, ""]:
        hidden, output = forward(params, batch)
        return cross_entropy(hidden, output, jnp.asarray(batch.targets), jnp.asarray(batch.weights), vocabulary)

    return loss


def make_train_step(
    make_model: MakeModel, vocabulary: int, optimizer: optax.GradientTransformation, schedule: optax.Schedule
) -> TrainStep:
    """A jitted function that does one update; the state it is given is donated.

    The batch's arrays are [parts, B, L]: gradients are added up over the parts, one after another. The loss is the
    mean over all tokens of all parts by weight, so the number of parts changes nothing but memory and time.
    """
    loss_and_gradient = jax.value_and_grad(make_loss(make_model, vocabulary))

    @partial(jax.jit, donate_argnums=0)
    def train_step(state: TrainState, batch: Batch):
        # A batch without a token that counts, as one of masked prompts, brings no gradient, and no division by 0.
        total_weight = jnp.sum(batch.weights)
        batch = batch._replace(weights=batch.weights / jnp.where(total_weight > 0, total_weight, jnp.float32(1)))

        def add(total, part: Batch):
            return jax.tree.map(jnp.add, total, loss_and_gradient(state.params, part)), None

        nothing = jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, state.params)
        # A single part needs no loop, which would only keep the compiler from seeing the whole.
        (loss, gradient), _ = lax.scan(add, nothing, batch, unroll=batch.tokens.shape[0] == 1)
        with jax.numpy_dtype_promotion("standard"):  # optax counts on it, where the project may be held to "strict"
            updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
            rate = jnp.asarray(schedule(state.step), jnp.float32)
        params: Any = optax.apply_updates(state.params, updates)
        norm = jnp.sqrt(sum(jnp.sum(leaf * leaf) for leaf in jax.tree.leaves(gradient)))
        return TrainState(params, opt_state, state.step + 1), Metrics(loss, norm, rate)

    return train_step
