"""What the model makes of held-out text: the beginnings of a few rows, continued token by token.

A look at a run, not a way to generate: every token costs a forward pass over the whole, if short, row.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import P
from jaxtyping import Array, Float, Int

from ringattn.data import Batch, Tokenizer
from ringattn.mesh import TENSOR, TOKENS
from ringattn.model import Params
from ringattn.training.step import MakeModel

PROMPT, NEW, SHOWN = 160, 96, 3
"""Tokens of a row that are given, tokens that the model adds, rows that are shown."""
TEMPERATURE = 0.8


NextLogits = Callable[..., Float[Array, "B V"]]


def make_next_logits(make_model: MakeModel, vocabulary: int) -> NextLogits:
    """A jitted function: parameters, a Batch's arrays [B, L] and `here` -> the logits of what follows the token there.

    `here` [B, L] float32 is 1 at one token of each row and 0 elsewhere, so that it can be laid out like the rows.
    """
    graphdef = nnx.graphdef(nnx.eval_shape(make_model))

    @jax.jit
    def next_logits(params: Params, tokens: Any, positions: Any, segment_ids: Any, here: Any):
        model = nnx.merge(graphdef, params)
        hidden = model(tokens, positions, segment_ids)
        rows = P(TOKENS[0], None)
        there = jnp.einsum("bl,ble->be", here.astype(hidden.dtype), hidden, out_sharding=rows)
        logits = jnp.einsum(
            "be,ve->bv",
            there,
            jax.reshard(model.output().astype(hidden.dtype), P(TENSOR, None)),
            out_sharding=P(None, None),
        )
        return logits.astype(jnp.float32)[:, :vocabulary]

    return next_logits


def continue_rows(
    batch: Batch, prompt: int, seed: int, next_logits: Callable[[Batch, Float[np.ndarray, "B L"]], Any]
) -> Int[np.ndarray, "B L"]:
    """The rows [B, L] of `batch` with all tokens from `prompt` on drawn by the model, at TEMPERATURE.

    `next_logits(rows, here)` gives logits [B, V] of what follows the one token of each row that `here` marks.
    """
    random, tokens = np.random.default_rng(seed), batch.tokens.copy()
    # The document that the prompt ends in goes on.
    later = np.arange(1, tokens.shape[1] - prompt + 1, dtype=np.int32)
    positions, segment_ids = batch.positions.copy(), batch.segment_ids.copy()
    positions[:, prompt:] = positions[:, prompt - 1 : prompt] + later
    segment_ids[:, prompt:] = segment_ids[:, prompt - 1 : prompt]
    for place in range(prompt, tokens.shape[1]):
        here = np.zeros(tokens.shape, np.float32)
        here[:, place - 1] = 1
        rows = batch._replace(tokens=tokens, positions=positions, segment_ids=segment_ids)
        logits = np.asarray(next_logits(rows, here))
        tokens[:, place] = np.argmax(logits / TEMPERATURE + random.gumbel(size=logits.shape), axis=-1)
    return tokens


def as_text(tokens: Int[np.ndarray, "B L"], prompt: int, tokenizer: Tokenizer) -> str:
    """The first rows, each as what was given and what the model made of it."""
    parts = []
    for number, row in enumerate(tokens[:SHOWN], 1):
        parts += [
            f"=== {number}: given",
            tokenizer.decode(row[:prompt]),
            "--- and made of it",
            tokenizer.decode(row[prompt:]),
        ]
    return "\n".join(parts) + "\n"
