"""The command scripts/generate.py: prompts, conversations, saved caches."""

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from ringattn import config
from ringattn.generation.conversation import Conversation
from ringattn.generation.generator import Generator
from ringattn.generation.prompts import Prompt
from ringattn.generation.sampling import Sampling
from ringattn.runs.files import expanded
from ringattn.runs.progress import progress_bar
from ringattn.units import bytes_in_words
from ringattn.weights import check_target

MAX_PROMPT_BYTES = 2**31
"""Larger prompt files are refused."""


@dataclass
class _Speed:
    """Numbers of tokens and seconds of prefill and decoding."""

    prompt_tokens: int = 0
    prefill_seconds: float = 0.0
    tokens: int = 0
    decode_seconds: float = 0.0
    cache_bytes: int = 0
    """Bytes of the cache per device."""
    _start: float = field(default_factory=time.monotonic)

    def prefilled(self, tokens: int) -> None:
        now = time.monotonic()
        self.prompt_tokens, self.prefill_seconds, self._start = tokens, now - self._start, now

    def decoded(self, tokens: int) -> None:
        self.tokens, self.decode_seconds = tokens, time.monotonic() - self._start

    def lines(self) -> Iterator[str]:
        speed = self.prompt_tokens / max(self.prefill_seconds, 1e-9)
        yield f"prefill: {self.prompt_tokens:,} tokens in {self.prefill_seconds:.1f} s, {speed:,.0f} tokens/s"
        if self.tokens:
            speed = self.tokens / max(self.decode_seconds, 1e-9)
            yield f"decode: {self.tokens:,} tokens in {self.decode_seconds:.1f} s, {speed:,.1f} tokens/s"
        yield f"cache: {bytes_in_words(self.cache_bytes)} per device (the first times include compilation)"


def run(c: config.Generation, *, as_json: bool) -> None:
    """Runs the command. Raises ValueError, with a fix, for anything that is wrong with options, prompt or model."""
    if c.run is None and c.weights is None:
        raise ValueError(
            "no model is given; use --run runs/quickstart, --weights DIRECTORY or a --config that sets one"
        )
    sampling = Sampling(
        temperature=c.temperature,
        top_k=c.top_k,
        top_p=c.top_p,
        min_p=c.min_p,
        repetition_penalty=c.repetition_penalty,
        seed=c.seed,
    )
    interactive = c.chat and c.prompt is None and c.prompt_file is None and sys.stdin.isatty()
    if interactive and as_json:
        raise ValueError("--json needs a prompt; use --prompt or --prompt_file")
    text = None if interactive else _prompt(c)
    if c.save_cache is not None:
        check_target(c.save_cache)
    generator = _load(c)
    if interactive:
        return _converse(generator, c, sampling)
    assert text is not None
    prompt: Prompt = generator.served.texts.chat_ids(text) if c.chat else text
    if c.save_cache is not None:
        with progress_bar("prefill", on_stderr=True) as advance:
            cache = generator.prefill(prompt, advance=advance)
        cache.save(c.save_cache)
        size = bytes_in_words(cache.bytes_per_device)
        print(f"{c.save_cache}: cache of {cache.tokens.size:,} tokens, {size} per device")
    else:
        _answer(generator, c, sampling, prompt, as_json)


def _prompt(c: config.Generation) -> str:
    """Returns the prompt. Raises ValueError if it cannot be read or is not UTF-8."""
    if c.prompt is not None:
        return c.prompt
    if c.prompt_file is None and sys.stdin.isatty():
        raise ValueError("no prompt is given; use --prompt, --prompt_file or standard input")
    source = "standard input" if c.prompt_file in (None, "-") else c.prompt_file
    try:
        if c.prompt_file in (None, "-"):
            content = sys.stdin.buffer.read(MAX_PROMPT_BYTES + 1)
        else:
            assert c.prompt_file is not None
            with expanded(c.prompt_file).open("rb") as file:
                content = file.read(MAX_PROMPT_BYTES + 1)
    except OSError as error:
        raise ValueError(f"{source} cannot be read ({error.strerror}); use another --prompt_file") from None
    if len(content) > MAX_PROMPT_BYTES:
        raise ValueError(f"{source} has more than {MAX_PROMPT_BYTES:,} bytes; use a shorter prompt")
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        problem = f"is not valid UTF-8 at byte {error.start}"
        raise ValueError(f"{source} {problem}; convert it, as with iconv -f latin1 -t utf-8") from None
    if not text:
        raise ValueError(f"{source} is empty; give a prompt of at least one character")
    return text


def _load(c: config.Generation) -> Generator:
    path = c.run if c.weights is None else c.weights
    assert path is not None
    with progress_bar("loading", in_bytes=True, every_process=True, on_stderr=True) as advance:
        return Generator.load(
            path,
            c.mesh,
            cache_tokens=c.cache_tokens,
            cache_dtype=c.cache_dtype,
            dtype=c.dtype,
            chunk=c.chunk,
            advance=advance,
        )


def _answer(generator: Generator, c: config.Generation, sampling: Sampling, prompt: Prompt, as_json: bool) -> None:
    """Prints the answers to one prompt."""
    cache = None if c.cache is None else generator.load_cache(c.cache)
    options: dict[str, Any] = {**asdict(sampling), "max_tokens": c.max_tokens, "stop": c.stop or (), "cache": cache}
    tokens, start = generator.served.texts.ids(prompt, continues=cache is not None), time.monotonic()
    if as_json or c.samples > 1:
        results = generator.generate([prompt], samples=c.samples, **options)
        seconds = time.monotonic() - start
        if as_json:
            content = {"prompt_tokens": tokens.size, "results": [asdict(result) for result in results]}
            print(json.dumps(content, indent=2))
        else:
            for number, result in enumerate(results, 1):
                print(f"=== {number}\n{result.text}")
            made = f"{sum(len(result.tokens) for result in results):,} tokens of {c.samples} answers"
            print(f"{tokens.size:,} tokens of the prompt and {made} in {seconds:.1f} s", file=sys.stderr)
        return
    conversation = Conversation(generator.served, cache)
    _stream(conversation, prompt, tokens.size, options)


def _stream(conversation: Conversation, prompt: Prompt, tokens: int, options: dict[str, Any]) -> None:
    """Prints an answer while it is generated, and its speed."""
    speed = _Speed()
    before = conversation.tokens.size
    options = {name: value for name, value in options.items() if name != "cache"}
    with progress_bar("prefill", on_stderr=True) as advance:
        pieces = conversation.answer(prompt, advance=advance, **options)
        first = next(pieces, "")
    speed.prefilled(tokens)
    print(first, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    speed.decoded(conversation.tokens.size - before - tokens)
    speed.cache_bytes = conversation.cache_bytes_per_device
    print(flush=True)
    for line in speed.lines():
        print(line, file=sys.stderr)


def _converse(generator: Generator, c: config.Generation, sampling: Sampling) -> None:
    """Answers messages from the terminal until the end of input. The conversation stays in the cache."""
    cache = None if c.cache is None else generator.load_cache(c.cache)
    conversation = Conversation(generator.served, cache)
    options = {**asdict(sampling), "max_tokens": c.max_tokens, "stop": c.stop or ()}
    print("Write a message; Ctrl-D ends the conversation.", file=sys.stderr)
    while True:
        try:
            message = input("> ")
        except EOFError:
            print()
            return
        try:
            ids = generator.served.texts.chat_ids(message, conversation.last)
            _stream(conversation, ids, ids.size, options)
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
