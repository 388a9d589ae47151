"""A model that is ready to generate: its prompts, and the caches that they share."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import numpy as np

from ringattn.generation import cache as caches
from ringattn.generation.prompts import Prompt, Texts
from ringattn.generation.rows import Advance, Engine, Rows
from ringattn.generation.saved import PromptCache, model_key

MIN_SHARED = 32
"""Prompts that begin with at least this many equal tokens are prefilled once up to there."""


@dataclass(frozen=True)
class Served:
    """A model on devices, with its tokenizer."""

    engine: Engine
    texts: Texts
    known_key: str | None = None
    """`key`, if it is known."""

    @cached_property
    def key(self) -> str:
        """Digest of the model, which a saved cache must have."""
        with jax.set_mesh(self.engine.mesh):
            return self.known_key or model_key(self.engine.config, self.engine.params)

    def ids(self, prompt: Prompt, cache: PromptCache | None, max_tokens: int) -> np.ndarray:
        """Returns the ids of a prompt. Raises ValueError: see `generate`."""
        if cache is not None and cache.served.key != self.key:
            raise ValueError("the cache belongs to another model; prefill the prompt with this one")
        if cache is not None and cache.served.engine.mesh != self.engine.mesh:
            raise ValueError("the cache is on another mesh; save it, and load it with load_cache of this generator")
        tokens = self.texts.ids(prompt, continues=cache is not None)
        if not tokens.size and cache is None:
            raise ValueError("the prompt is empty; give it at least one token")
        self.check_room(tokens.size, max_tokens, cache)
        return tokens

    def check_room(self, tokens: int, max_tokens: int, cache: PromptCache | None) -> None:
        """Raises ValueError unless prompt and answer fit the cache."""
        cached = 0 if cache is None else cache.tokens.size
        total, most = cached + tokens + max_tokens, self.engine.cache_tokens
        if total > most:
            parts = f"{cached} cached tokens and " * (cached > 0) + f"a prompt of {tokens} tokens"
            answer = f" and an answer of max_tokens={max_tokens}" * (max_tokens > 0)
            fix = f"use a shorter prompt, or load the model with cache_tokens={total}"
            raise ValueError(f"{parts}{answer} do not fit cache_tokens={most}; {fix}")

    def share(self, rows: list[np.ndarray], cache: PromptCache | None) -> tuple[PromptCache | None, list[np.ndarray]]:
        """Returns the cache that all rows share, and the rest of each row: prompts that begin alike are prefilled once.

        A row keeps at least one token. An empty one gets the last token of the cache.
        """
        if cache is not None:
            if min(row.size for row in rows):
                return cache, rows
            return cache.shortened(), [np.concatenate([cache.tokens[-1:], row]) for row in rows]
        shortest = min(row.size for row in rows) - 1
        head = np.stack([row[:shortest] for row in rows])
        same = int(np.logical_and.accumulate((head == head[:1]).all(0)).sum())
        if len(rows) == 1 or same < MIN_SHARED:
            return None, rows
        return self.prefill(rows[0][:same]), [row[same:] for row in rows]

    def rows(self, count: int, cache: PromptCache | None) -> Rows:
        """Returns `count` empty rows that continue `cache`. Call it under the mesh."""
        return Rows(self.engine, count) if cache is None else Rows(self.engine, count, cache.cache, cache.tokens.size)

    def prefill(self, tokens: np.ndarray, advance: Advance | None = None) -> PromptCache:
        """Returns the cache of a prompt. Call it under the mesh."""
        batch = Rows(self.engine, 1)
        batch.extend([tokens], advance)
        assert batch.cache is not None
        return PromptCache(tokens, caches.shared(batch.cache), self)


def check_count(name: str, value: Any) -> None:
    """Raises ValueError unless `value` is a positive int."""
    if type(value) is not int or not 1 <= value < 2**30:
        raise ValueError(f"{name}={value!r} must be an int from 1 to {2**30 - 1}")
