"""The state of a training run and the two jitted functions that read and change it."""

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
EvalStep = Callable[[Params, Batch], tuple[Float[Array, ""], Float[Array, ""]]]


def make_initial_state(make_model: MakeModel, optimizer: optax.GradientTransformation) -> Callable[[], TrainState]:
    """A jitted function that makes the state of step 0, each array in the pieces in which it will lie."""

    @jax.jit
    def initial_state() -> TrainState:
        _, params = nnx.split(make_model())
        return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))

    return initial_state


def make_loss(make_model: MakeModel, vocabulary: int) -> Callable[[Params, Batch], Float[Array, ""]]:
    """Parameters and a batch [B, L] -> the sum of its weighted losses, in nats."""
    graphdef = nnx.graphdef(nnx.eval_shape(make_model))

    def loss(params: Params, batch: Batch) -> Float[Array, ""]:
        model = nnx.merge(graphdef, params)
        tokens, targets, positions, segment_ids, weights = map(jnp.asarray, batch)
        hidden = model(tokens, positions, segment_ids)
        return cross_entropy(hidden, model.output(), targets, weights, vocabulary)

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
        batch = batch._replace(weights=batch.weights / jnp.sum(batch.weights))

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


def make_eval_step(make_model: MakeModel, vocabulary: int) -> EvalStep:
    """A jitted function: parameters and a batch [parts, B, L] -> the sum of weighted losses and that of weights."""
    loss = make_loss(make_model, vocabulary)

    @jax.jit
    def eval_step(params: Params, batch: Batch):
        return jnp.sum(lax.map(partial(loss, params), batch)), jnp.sum(batch.weights)

    return eval_step
