"""A conversation: one row that grows."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from ringattn.generation import cache as caches
from ringattn.generation.prompts import Prompt
from ringattn.generation.rows import Advance, Rows
from ringattn.generation.sampling import Sampling
from ringattn.generation.saved import PromptCache
from ringattn.generation.served import Served, check_count
from ringattn.generation.text import TextStream


class Conversation:
    """One row that grows: prompts and answers stay in the cache, so that each turn computes only its own tokens."""

    def __init__(self, served: Served, cache: PromptCache | None = None):
        self.served, self.shared = served, cache
        self.tokens = np.zeros(0, np.int32)
        """All ids of the row so far, without those of the shared cache."""
        self._batch: Rows | None = None
        self._base: PromptCache | None = None
        """The cache before the row: the shared one, without its last token if the first prompt was empty."""
        self._turns = self._sampled = 0

    @property
    def last(self) -> int | None:
        """The last token of the last answer; None before the first prompt."""
        return int(self.tokens[-1]) if self.tokens.size else None

    @property
    def cache_bytes_per_device(self) -> int:
        """Bytes of keys, values and scales on each device, the shared cache included."""
        found = [] if self.shared is None else [self.shared.cache]
        if self._batch is not None and self._batch.cache is not None:
            found.append(self._batch.cache)
        return sum(caches.bytes_per_device(cache) for cache in found)

    def answer(
        self,
        prompt: Prompt,
        *,
        max_tokens: int = 256,
        stop: Sequence[str | int] = (),
        advance: Advance | None = None,
        **sampling: Any,
    ) -> Iterator[str]:
        """Yields the text of the answer, in whole characters. See `Generator.generate`. A caller may stop early."""
        served, options = self.served, Sampling(**sampling)
        strings, ids = served.texts.stops(stop)
        earlier = self.tokens.size > 0 or self.shared is not None
        new = served.texts.ids(prompt, continues=earlier)
        if not new.size and (self.tokens.size > 0 or self.shared is None):
            raise ValueError("the prompt is empty; give it at least one token")
        check_count("max_tokens", max_tokens)
        served.check_room(self.tokens.size + new.size, max_tokens, self.shared)
        self._turns += 1
        turn, sampled = self._turns, self._sampled
        with jax.set_mesh(served.engine.mesh):
            batch, logits = self._extend(new, advance)
            before = [] if self._base is None else [self._base.tokens]
            seen = None if options.greedy else [np.concatenate([*before, self.tokens])]
            steps = batch.generate(logits, options, seen, 1, first=sampled)
        text = TextStream(served.texts.decode, strings)
        for _ in range(max_tokens):
            if turn != self._turns:
                raise ValueError("a later answer of this conversation has begun; finish an answer before the next one")
            self._batch = None  # until the step is complete: an interrupted one would leave the cache ahead of `tokens`
            with jax.set_mesh(served.engine.mesh):
                tokens, _ = next(steps)
            self.tokens, self._batch, self._sampled = np.append(self.tokens, tokens), batch, self._sampled + 1
            if int(tokens[0]) in ids:
                break
            yield text.add(int(tokens[0]))
            if text.stopped:
                return
        yield text.finish()

    def _extend(self, new: np.ndarray, advance: Advance | None) -> tuple[Rows, jax.Array]:
        """Appends tokens to the row. Returns it, with the logits of the next token.

        After an interruption, which leaves no batch, the row is prefilled again.
        """
        batch, self._batch = self._batch, None
        if batch is None:
            if not self.tokens.size:
                self._base, (new,) = self.served.share([new], self.shared)
            batch, missing = self.served.rows(1, self._base), np.concatenate([self.tokens, new])
        else:
            missing = new
        logits = batch.extend([missing], advance)
        self.tokens, self._batch = np.concatenate([self.tokens, new]), batch
        return batch, logits
