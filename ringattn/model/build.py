"""Builds a model from a config, and its forward pass as a function of the parameters."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ringattn import config
from ringattn.attn.attention import attention
from ringattn.data import Batch
from ringattn.mesh.axes import SEQUENCE
from ringattn.model.families import output_soft_cap
from ringattn.model.parallel import Params
from ringattn.model.transformer import Transformer

MakeModel = Callable[[], Transformer]


def model_factory(c: config.Config, vocabulary: int) -> MakeModel:
    """Returns a function that creates the model of `c`, initialized from train.seed. Call it under a mesh.

    Raises ValueError if `model.vocabulary` is smaller than `vocabulary`, the tokenizer's vocabulary size, or if
    `model.remat` is not chosen yet.
    """
    if c.model.remat == "auto":
        raise ValueError("model.remat='auto' must be chosen before the model is built; use ringattn.planning.choose")
    model_vocabulary = vocabulary if c.model.vocabulary is None else c.model.vocabulary
    if model_vocabulary < vocabulary:
        rule = f"model.vocabulary={model_vocabulary} must be at least {vocabulary}, the tokenizer's vocabulary size"
        raise ValueError(f"{rule}; use --model.vocabulary {vocabulary} or None")
    options = {"layout": c.attention.layout, "strategy": c.attention.strategy, "kernel": c.attention.kernel}
    attend = partial(attention, axis=SEQUENCE, **options)

    def make_model() -> Transformer:
        return Transformer(c.model, model_vocabulary, attend, nnx.Rngs(params=c.train.seed))

    return make_model


Forward = Callable[[Params, Batch], tuple[Float[Array, "B L E"], Float[Array, "V E"], float | None]]


def make_forward(make_model: MakeModel) -> Forward:
    """Returns forward(params, batch [B, L]) -> (hidden states, output projection, soft cap), inputs of the losses."""
    graphdef = nnx.graphdef(nnx.eval_shape(make_model))

    def forward(params: Params, batch: Batch):
        model = nnx.merge(graphdef, params)
        hidden = model(*jax.tree.map(jnp.asarray, (batch.tokens, batch.positions, batch.segment_ids)))
        return hidden, model.output_table(), output_soft_cap(model.config)

    return forward
