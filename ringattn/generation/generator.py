"""Generates text: the cache of a prompt is sharded over the ring, and tokens are streamed out."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from ringattn import config, weights
from ringattn.generation.conversation import Conversation
from ringattn.generation.programs import compute_params, generation_model, make_programs
from ringattn.generation.prompts import Prompt, Texts
from ringattn.generation.rows import Advance, Engine
from ringattn.generation.sampling import Sampling
from ringattn.generation.saved import PromptCache, load_cache, model_key
from ringattn.generation.scoring import score_rows
from ringattn.generation.served import Served, check_count
from ringattn.generation.text import TextStream
from ringattn.model.parallel import Params

CHUNK = 2048
"""Default of `chunk`."""


@dataclass(frozen=True)
class Result:
    """The answer to a prompt."""

    tokens: list[int]
    """Generated ids. Ends with the stop token if one was generated."""
    text: str
    """Their text, without the stop token, and up to a stop string."""
    log_probs: list[float]
    """Log-probability in nats of each token, by the model itself: before temperature, penalty and filters."""
    finish: str
    """"stop": a stop token or string; "length": `max_tokens`."""


@dataclass
class _Answer:
    """An answer while it is generated."""

    stream: TextStream
    ends: frozenset[int]
    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    finish: str = ""
    """"" until it is complete; then as in `Result`."""

    def add(self, token: int, log_prob: float, *, last: bool) -> None:
        """Adds a token, unless the answer is complete. `last`: it may have no more tokens."""
        if self.finish:
            return
        self.tokens.append(token)
        self.log_probs.append(log_prob)
        if token not in self.ends:
            self.stream.add(token)
        if token in self.ends or self.stream.stopped:
            self.finish = "stop"
        elif last:
            self.finish = "length"

    def result(self) -> Result:
        self.stream.finish()
        return Result(self.tokens, self.stream.text, self.log_probs, self.finish)


class Generator:
    """A model that generates, scores and caches prompts on a mesh."""

    def __init__(self, served: Served):
        self.served = served

    @classmethod
    def load(
        cls,
        path: str | Path,
        mesh: config.Mesh | None = None,
        *,
        cache_tokens: int | None = None,
        cache_dtype: str = "bfloat16",
        dtype: str | None = None,
        chunk: int = CHUNK,
        advance: Any = lambda done, total: None,
    ) -> "Generator":
        """Loads the model at `path` onto a mesh over all devices.

        Args:
          path, mesh, advance: see `weights.load`.
          cache_tokens: maximum number of tokens of a prompt and its answer. Default: the context length that the model
            was trained for.
          cache_dtype: dtype of the cache: float32, bfloat16 or int8 (with one scale per token and head).
          dtype: compute dtype, float32 or bfloat16. Default: bfloat16 on TPU and GPU, float32 on CPU.
          chunk: number of tokens of a prompt that are computed at a time.

        Raises ValueError, with a fix: see `weights.load`; and for a value out of range.
        """
        _check_choice("cache_dtype", cache_dtype, ("float32", "bfloat16", "int8"))
        _check_choice("dtype", dtype, ("float32", "bfloat16", None))
        check_count("chunk", chunk)
        if cache_tokens is not None:
            check_count("cache_tokens", cache_tokens)
        loaded = weights.load(path, mesh, advance)
        if dtype is None:
            dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
        texts, key = Texts.of(loaded), None
        model = replace(loaded.config, vocabulary=texts.vocabulary)
        if dtype != "float32":  # otherwise it is computed when a cache needs it
            with jax.set_mesh(loaded.mesh):
                key = model_key(model, loaded.params)
        return cls.of(
            model,
            loaded.params,
            loaded.mesh,
            texts,
            cache_tokens=cache_tokens or loaded.details.context,
            cache_dtype=cache_dtype,
            dtype=dtype,
            chunk=chunk,
            key=key,
        )

    @classmethod
    def of(
        cls,
        model: config.Model,
        params: Params,
        mesh: jax.sharding.Mesh,
        texts: Texts,
        *,
        cache_tokens: int,
        cache_dtype: str = "bfloat16",
        dtype: str = "float32",
        chunk: int = CHUNK,
        key: str | None = None,
    ) -> "Generator":
        """Returns the generator of a model whose float32 `params` are on `mesh`."""
        c = generation_model(model, dtype)
        with jax.set_mesh(mesh):
            params = compute_params(params, dtype)
        engine = Engine(c, mesh, params, make_programs(c, mesh), cache_dtype, cache_tokens, chunk)
        return cls(Served(engine, texts, key))

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        max_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        stop: Sequence[str | int] = (),
        samples: int = 1,
        cache: PromptCache | None = None,
        advance: Advance | None = None,
        after_token: Callable[[], None] = lambda: None,
    ) -> list[Result]:
        """Returns `samples` answers per prompt, in the order of the prompts.

        Args:
          prompts: texts, or lists of ids. A text becomes the ids of a document: it gets the begin-of-text token if the
            model has one. Names of special tokens in it are plain text.
          max_tokens: maximum number of tokens of an answer.
          temperature, top_k, top_p, min_p, repetition_penalty, seed: see `Sampling`.
          stop: strings and ids that end an answer, besides the model's own end-of-text tokens.
          samples: number of answers per prompt, which share the prompt's cache.
          cache: a cache that all prompts continue. A prompt may then be empty. Its text follows the cached one
            directly.
          advance: called while the prompts are prefilled.
          after_token: called after each token of all answers. Its exceptions end the generation.

        Raises ValueError for a value out of range, an empty prompt, an id outside the vocabulary, and prompts that do
        not fit the cache.
        """
        if isinstance(prompts, str):
            raise ValueError(f"prompts={prompts[:20]!r} must be a list of prompts; use [prompt]")
        sampling = Sampling(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
        )
        check_count("samples", samples)
        check_count("max_tokens", max_tokens)
        served = self.served
        rows = [served.ids(prompt, cache, max_tokens) for prompt in prompts for _ in range(samples)]
        strings, ids = served.texts.stops(stop)
        if not rows:
            return []
        answers = [_Answer(TextStream(served.texts.decode, strings), ids) for _ in rows]
        with jax.set_mesh(served.engine.mesh):
            shared, own = served.share(rows, cache)
            batch = served.rows(len(rows), shared)
            logits = batch.extend(own, advance)
            seen = own if shared is None else [np.concatenate([shared.tokens, row]) for row in own]
            for number, step in enumerate(batch.generate(logits, sampling, seen, samples), 1):
                for answer, token, nats in zip(answers, *step, strict=True):
                    answer.add(int(token), float(nats), last=number == max_tokens)
                after_token()
                if all(answer.finish for answer in answers):
                    break
        return [answer.result() for answer in answers]

    def stream(self, prompt: Prompt, **options: Any) -> Iterator[str]:
        """Yields the answer to a prompt as text, in whole characters. `options` are those of `generate`."""
        conversation = Conversation(self.served, options.pop("cache", None))
        yield from conversation.answer(prompt, **options)

    def score(
        self, prompt: Prompt, continuation: Prompt, *, cache: PromptCache | None = None
    ) -> Float[np.ndarray, " tokens"]:
        """Returns the log-probability in nats (float32) of each token of `continuation` after `prompt`."""
        return self.scores([(prompt, continuation)], cache=cache)[0][0]

    def scores(
        self, pairs: Sequence[tuple[Prompt, Prompt]], *, cache: PromptCache | None = None
    ) -> list[tuple[Float[np.ndarray, " tokens"], bool]]:
        """Returns `score` for several (prompt, continuation), and whether each continuation is the greedy one.

        Raises ValueError: see `generate`.
        """
        served = self.served
        contexts = [served.ids(prompt, cache, 0) for prompt, _ in pairs]
        continuations = [served.texts.ids(text, continues=True) for _, text in pairs]
        for context, continuation in zip(contexts, continuations, strict=True):
            if not continuation.size:
                raise ValueError("the continuation is empty; give it at least one token")
            served.check_room(context.size + continuation.size, 0, cache)
        if not pairs:
            return []
        with jax.set_mesh(served.engine.mesh):
            shared, own = served.share(contexts, cache)
            rows = [np.concatenate(pair) for pair in zip(own, continuations, strict=True)]
            found = score_rows(served.rows(len(rows), shared), rows)
        sizes = [continuation.size for continuation in continuations]
        return [
            (-nats[-size:], bool((likely[-size:] == continuation).all()))
            for (nats, likely), size, continuation in zip(found, sizes, continuations, strict=True)
        ]

    def prefill(self, prompt: Prompt, *, advance: Advance | None = None) -> PromptCache:
        """Returns the cache of a prompt, for `generate(..., cache=...)`. Raises ValueError: see `generate`."""
        tokens = self.served.ids(prompt, None, 0)
        with jax.set_mesh(self.served.engine.mesh):
            return self.served.prefill(tokens, advance)

    def load_cache(self, path: str | Path) -> PromptCache:
        """Returns a cache that `PromptCache.save` wrote, on any number of devices.

        Raises ValueError if it is missing or damaged, or if it is that of another model or of another dtype.
        """
        with jax.set_mesh(self.served.engine.mesh):
            return load_cache(Path(path), self.served)


def _check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} must be one of {', '.join(map(str, choices))}")
