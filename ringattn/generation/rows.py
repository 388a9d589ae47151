"""The rows of a batch while they are generated: their cache on the devices, and its bookkeeping on the host."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import P
from jaxtyping import Array, Int

from ringattn import config
from ringattn.data.placement import permute_and_place
from ringattn.generation import cache as caches
from ringattn.generation.cache import Cache
from ringattn.generation.prefill import Chunk
from ringattn.generation.programs import Pending, Programs, replicated
from ringattn.generation.sampling import Sampling
from ringattn.layout import order
from ringattn.mesh.axes import DATA, context_shards, place
from ringattn.model.parallel import Params

Advance = Callable[[int, int], None]
"""Called with the number of tokens of the longest row that are prefilled, and their total number."""


@dataclass(frozen=True)
class Engine:
    """A model on devices, and the sizes that generation uses."""

    config: config.Model
    """In the compute dtype. The vocabulary is set."""
    mesh: jax.sharding.Mesh
    params: Params
    programs: Programs
    cache_dtype: str
    cache_tokens: int
    """Maximum number of tokens of a row, those of a shared cache included."""
    chunk: int
    """Maximum number of tokens of each row in a chunk."""

    @property
    def shards(self) -> int:
        """Number of devices over which a row is sharded."""
        return context_shards(self.mesh)

    def chunk_length(self, tokens: int) -> int:
        """Returns the length of the next chunk for `tokens` remaining tokens: a quarter, a sixteenth, ... of a chunk.

        A length is a multiple of the number of shards. Short remainders would otherwise be padded to a whole chunk,
        and a length of their own would compile a program.
        """
        lengths = {-(-self.chunk // 4**n // self.shards) * self.shards for n in range(8)}
        return min((x for x in lengths if x >= min(max(tokens, 16), max(lengths))), default=max(lengths))


@dataclass(frozen=True)
class Done:
    """A computed chunk: token i of row b is number first[b] + i of the row, valid from begin[b] to end[b] - 1."""

    length: int
    first: Int[np.ndarray, " B"]
    begin: Int[np.ndarray, " B"]
    end: Int[np.ndarray, " B"]


OnChunk = Callable[[Done, Array], None]
"""Called after each chunk with what it holds, and its hidden states [B, L, E] in striped order."""


class Rows:
    """B rows that are generated together, after an optional cache that they share.

    The number of rows is padded to a multiple of the data axis. Use it under `jax.set_mesh(engine.mesh)`.
    """

    def __init__(self, engine: Engine, count: int, base: Cache | None = None, base_length: int = 0):
        self.engine, self.count, self.base, self.base_length = engine, count, base, base_length
        self.padded = -(-count // engine.mesh.shape[DATA]) * engine.mesh.shape[DATA]
        self.lengths = np.zeros(self.padded, np.int64)
        """Number of tokens of each row in the cache, without those of the shared cache."""
        self._capacity = 0
        self.cache: Cache | None = None

    def extend(
        self, rows: Sequence[np.ndarray], advance: Advance | None = None, on_chunk: OnChunk | None = None
    ) -> Array:
        """Appends tokens to each row, in chunks. Returns the logits [B, V] after each row's last token.

        Each row must get at least one token.
        """
        rows = [*rows, *(rows[-1][:1] for _ in range(self.padded - self.count))]
        engine, start = self.engine, self.lengths.copy()
        sizes = np.array([len(row) for row in rows])
        assert sizes.min() > 0
        target, total = start + sizes, int(sizes.max())
        logits = replicated(np.zeros((self.padded, engine.config.vocabulary or 0), np.float32), engine.mesh)
        while (self.lengths < target).any():
            first = self.lengths // engine.shards * engine.shards
            length = engine.chunk_length(int((target - first)[self.lengths < target].max()))
            end = np.maximum(np.minimum(first + length, target), self.lengths)
            tokens = np.zeros((self.padded, length), np.int32)
            for number, row in enumerate(rows):
                begin = self.lengths[number]
                tokens[number, begin - first[number] : end[number] - first[number]] = row[
                    begin - start[number] : end[number] - start[number]
                ]
            done = Done(length, first, self.lengths, end)
            hidden = self._compute(done, tokens)
            ends = (end == target) & (self.lengths < target)
            if ends.any():
                index = np.argsort(order("striped", length, engine.shards))[np.clip(end - 1 - first, 0, length - 1)]
                index, chosen = replicated(index.astype(np.int32), engine.mesh), replicated(ends, engine.mesh)
                logits = engine.programs.pick(engine.params, hidden, index, chosen, logits)
            if on_chunk is not None:
                on_chunk(done, hidden)
            self.lengths = end
            if advance is not None:
                advance(int(min((end - start).max(), total)), total)
        return logits

    def _compute(self, done: Done, tokens: Int[np.ndarray, "B L"]) -> Array:
        """Computes a chunk, and appends it to the cache. Returns its hidden states."""
        engine = self.engine
        cache = self._grown(int(done.end.max()))
        (placed,) = permute_and_place([tokens], engine.mesh, "striped")
        bounds = np.stack([done.first, done.begin, done.end]).astype(np.int32)
        chunk = Chunk(placed, *place(tuple(bounds), engine.mesh, P(DATA)))
        self.cache, hidden = engine.programs.extend(engine.params, cache, self.base, chunk)
        return hidden

    def _grown(self, tokens: int) -> Cache:
        """Returns the cache with room for `tokens` tokens of each row."""
        engine = self.engine
        if self.cache is None:
            self._capacity = caches.capacity(tokens, engine.cache_tokens)
            dtype, offset = engine.cache_dtype, self.base_length
            return caches.empty(engine.config, self.padded, self._capacity, dtype, engine.mesh, offset)
        if tokens <= self._capacity:
            return self.cache
        self._capacity = caches.capacity(tokens, engine.cache_tokens)
        return caches.grow(self.cache, engine.config, self._capacity, engine.mesh)

    def generate(
        self, logits: Array, sampling: Sampling, seen: Sequence[np.ndarray] | None, samples: int, first: int = 0
    ) -> Iterator[tuple[Int[np.ndarray, " B"], np.ndarray]]:
        """Yields the sampled tokens [B] and their log-probabilities [B], without end. `logits` are those of `extend`.

        Each token is in the cache once it has been yielded. `seen` are the tokens of each row so far, which
        repetition_penalty needs. Row b is sample b % samples of its prompt. `first` is the number of tokens that were
        sampled before with the same seed.
        """
        engine, vocabulary = self.engine, self.engine.config.vocabulary or 0
        keys: Any = None
        mask: Array | None = None
        if not sampling.greedy:
            numbers = np.arange(self.padded, dtype=np.int32) % samples
            key = jax.random.key(sampling.seed)
            keys = jax.vmap(lambda number: jax.random.fold_in(key, number))(jnp.asarray(numbers))
            table = np.zeros((self.padded, vocabulary), bool)
            for row, tokens in zip(table, seen or (), strict=False):
                row[tokens] = True
            mask = replicated(table, engine.mesh)
        none = replicated(np.zeros(self.padded, np.int32), engine.mesh)
        count = replicated(np.array(first, np.int32), engine.mesh)
        pending = Pending(logits, mask, count, none, none.astype(jnp.float32))
        values = sampling.values(vocabulary)
        while True:
            cache = self._grown(int(self.lengths[: self.count].max()) + 1)
            self.cache, pending = engine.programs.step(engine.params, cache, self.base, pending, keys, values)
            self.lengths = self.lengths + 1
            yield np.asarray(pending.tokens)[: self.count], np.asarray(pending.log_probs)[: self.count]
