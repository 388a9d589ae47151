"""Sampled continuations of held-out text.

For inspection only: without a KV cache, each token requires a forward pass over the whole, short sequence.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import P
from jaxtyping import Array, Float, Int

from ringattn.attn.kernels.protocol import matmul_precision
from ringattn.data import Batch, Tokenizer
from ringattn.mesh.axes import TENSOR, TOKENS
from ringattn.model.build import MakeModel
from ringattn.model.families import output_soft_cap
from ringattn.model.parallel import Params, soft_capped

PROMPT_TOKENS, NEW_TOKENS, SEQUENCES = 160, 96, 3
"""Tokens per prompt, sampled tokens per sequence, number of sequences."""
TEMPERATURE = 0.8

NextLogits = Callable[..., Float[Array, "B V"]]


def make_next_logits(make_model: MakeModel, vocabulary: int) -> NextLogits:
    """Returns a jitted next_logits(params, tokens, positions, segment_ids, one_hot) -> logits [B, V] of the next token.

    `one_hot` [B, L] float32 selects the token of each sequence whose next token is predicted. Unlike an index, it can
    be permuted and sharded like the tokens.
    """
    graphdef = nnx.graphdef(nnx.eval_shape(make_model))

    @jax.jit
    def next_logits(params: Params, tokens: Any, positions: Any, segment_ids: Any, one_hot: Any):
        model = nnx.merge(graphdef, params)
        hidden = model(tokens, positions, segment_ids)
        spec = P(TOKENS[0], None)
        einsum = partial(jnp.einsum, precision=matmul_precision(hidden.dtype))
        state = einsum("bl,ble->be", one_hot.astype(hidden.dtype), hidden, out_sharding=spec)
        table = jax.reshard(model.output_table().astype(hidden.dtype), P(TENSOR, None))
        logits = einsum("be,ve->bv", state, table, out_sharding=P(None, None))
        return soft_capped(logits.astype(jnp.float32), output_soft_cap(model.config))[:, :vocabulary]

    return next_logits


def continue_rows(
    batch: Batch, prompt: int, seed: int, next_logits: Callable[[Batch, Float[np.ndarray, "B L"]], Any]
) -> Int[np.ndarray, "B L"]:
    """Returns the tokens [B, L] of `batch`, with positions >= `prompt` sampled from the model at TEMPERATURE.

    `next_logits(rows, one_hot)` returns the logits [B, V] of the token after the selected one.
    """
    random, tokens = np.random.default_rng(seed), batch.tokens.copy()
    # The continuation belongs to the document in which the prompt ends.
    offsets = np.arange(1, tokens.shape[1] - prompt + 1, dtype=np.int32)
    positions, segment_ids = batch.positions.copy(), batch.segment_ids.copy()
    positions[:, prompt:] = positions[:, prompt - 1 : prompt] + offsets
    segment_ids[:, prompt:] = segment_ids[:, prompt - 1 : prompt]
    for index in range(prompt, tokens.shape[1]):
        one_hot = np.zeros(tokens.shape, np.float32)
        one_hot[:, index - 1] = 1
        rows = batch._replace(tokens=tokens, positions=positions, segment_ids=segment_ids)
        logits = np.asarray(next_logits(rows, one_hot))
        tokens[:, index] = np.argmax(logits / TEMPERATURE + random.gumbel(size=logits.shape), axis=-1)
    return tokens


def as_text(tokens: Int[np.ndarray, "B L"], prompt: int, tokenizer: Tokenizer) -> str:
    """Returns the first SEQUENCES sequences as text, each split into prompt and continuation."""
    lines = []
    for index, row in enumerate(tokens[:SEQUENCES], 1):
        lines += [
            f"=== {index}: prompt",
            tokenizer.decode(row[:prompt]),
            "--- model continuation",
            tokenizer.decode(row[prompt:]),
        ]
    return "\n".join(lines) + "\n"
