"""Sampled continuations of held-out text, for inspection."""

from collections.abc import Callable
from dataclasses import replace

import jax
import numpy as np
from jaxtyping import Int

from ringattn import config
from ringattn.data import Batch, Tokenizer
from ringattn.generation.generator import Generator
from ringattn.generation.prompts import Texts
from ringattn.model.parallel import Params

PROMPT_TOKENS, NEW_TOKENS, SEQUENCES = 160, 96, 3
"""Maximum number of tokens per prompt and per continuation, and number of sequences."""
TEMPERATURE = 0.8


def sample(
    model: config.Model,
    params: Params,
    mesh: jax.sharding.Mesh,
    tokenizer: Tokenizer,
    rows: Batch,
    seed: int,
    after_token: Callable[[], None],
) -> str:
    """Returns the beginnings of the first SEQUENCES of `rows` [B, L] as text, each with the model's continuation.

    Calls `after_token` after each token of the continuations.
    """
    model = replace(model, vocabulary=tokenizer.size)  # only these ids are trained
    prompts, most = beginnings(rows), max(min(PROMPT_TOKENS + NEW_TOKENS, rows.tokens.shape[1]), 2)
    generator = Generator.of(
        model,
        params,
        mesh,
        Texts.of_tokenizer(tokenizer, tokenizer.size, frozenset(), rows=True),
        cache_tokens=most,
        cache_dtype=model.dtype,
        dtype=model.dtype,
        chunk=max(prompt.size for prompt in prompts),
    )
    new = most - max(prompt.size for prompt in prompts)
    answers = generator.generate(prompts, max_tokens=new, temperature=TEMPERATURE, seed=seed, after_token=after_token)
    lines = []
    for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True), 1):
        lines += [f"=== {number}: prompt", tokenizer.decode(prompt), "--- model continuation", answer.text]
    return "\n".join(lines) + "\n"


def beginnings(rows: Batch) -> list[Int[np.ndarray, " tokens"]]:
    """Returns the beginnings of the first sequences of SEQUENCES rows: PROMPT_TOKENS, or 5/8 of a short sequence.

    A sequence is a document, or a row without segment ids.
    """
    share = PROMPT_TOKENS / (PROMPT_TOKENS + NEW_TOKENS)
    sizes = (rows.positions == np.arange(rows.positions.shape[1])).sum(1)  # positions restart at the next document
    lengths = np.clip((sizes * share).astype(int), 1, PROMPT_TOKENS)
    return [row[:length] for row, length in zip(rows.tokens[:SEQUENCES], lengths, strict=False)]
