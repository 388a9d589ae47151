"""Builds a model from a config, and its forward pass as a function of the parameters."""

from collections.abc import Callable
from functools import partial

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ringattn import config
from ringattn.attn.attention import attention
from ringattn.attn.mask import Mask
from ringattn.data import Batch
from ringattn.mesh.axes import SEQUENCE
from ringattn.model.parallel import Params
from ringattn.model.transformer import Transformer

MakeModel = Callable[[], Transformer]


def attention_mask(c: config.Config) -> Mask:
    """Returns the mask of every layer: causal, with the window of the config."""
    return Mask(causal=True, window=None if c.attention.window is None else (c.attention.window, 0))


def model_factory(c: config.Config, vocabulary: int) -> MakeModel:
    """Returns a function that creates the model of `c`, initialized from train.seed. Call it under a mesh.

    Raises ValueError if `model.vocabulary` is smaller than `vocabulary`, the tokenizer's vocabulary size.
    """
    model_vocabulary = vocabulary if c.model.vocabulary is None else c.model.vocabulary
    if model_vocabulary < vocabulary:
        rule = f"model.vocabulary={model_vocabulary} must be at least {vocabulary}, the tokenizer's vocabulary size"
        raise ValueError(f"{rule}; use --model.vocabulary {vocabulary} or None")
    options = {"layout": c.attention.layout, "strategy": c.attention.strategy, "kernel": c.attention.kernel}
    attend = partial(attention, mask=attention_mask(c), axis=SEQUENCE, **options)

    def make_model() -> Transformer:
        return Transformer(c.model, model_vocabulary, attend, nnx.Rngs(params=c.train.seed))

    return make_model


def make_forward(make_model: MakeModel) -> Callable[[Params, Batch], tuple[Float[Array, "B L E"], Float[Array, "V E"]]]:
    """Returns forward(params, batch [B, L]) -> (hidden states, output projection), the inputs of the losses."""
    graphdef = nnx.graphdef(nnx.eval_shape(make_model))

    def forward(params: Params, batch: Batch):
        model = nnx.merge(graphdef, params)
        return model(*map(jnp.asarray, (batch.tokens, batch.positions, batch.segment_ids))), model.output_table()

    return forward
