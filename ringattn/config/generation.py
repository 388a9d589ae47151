"""Config of text generation: model, prompt, sampling and cache."""

from dataclasses import field
from typing import Literal

from ringattn.config.checks import at_least, check_types, require, section
from ringattn.config.choices import Dtype
from ringattn.config.sections import Mesh


@section()
class Generation:
    run: str | None = None
    """Run directory (its newest checkpoint) or one of its checkpoints."""
    weights: str | None = None
    """Hugging Face directory or .gguf file."""
    prompt: str | None = None
    """Text to continue, or with chat the message of the user. None: prompt_file, or standard input."""
    prompt_file: str | None = None
    """UTF-8 file with the prompt; - for standard input."""
    chat: bool = False
    """Ask in the chat template of an instruct model. Without a prompt, on a terminal: a conversation."""
    max_tokens: int = 256
    """Maximum number of generated tokens per answer."""
    temperature: float = 0.0
    """Divides the logits. 0: the most likely token."""
    top_k: int | None = None
    """Sample among this number of most likely tokens. None: among all."""
    top_p: float | None = None
    """Sample among the most likely tokens whose probabilities sum to at least this. None: among all."""
    min_p: float | None = None
    """Sample among tokens at least this times as likely as the most likely one. None: among all."""
    repetition_penalty: float = 1.0
    """Divides positive logits of tokens that prompt or answer contain, and multiplies negative ones. 1: no effect."""
    seed: int = 0
    """Seed of sampling."""
    samples: int = 1
    """Number of answers, which share the cache of the prompt."""
    stop: tuple[str, ...] | None = None
    """Texts that end an answer, besides the model's own end-of-text tokens."""
    cache: str | None = None
    """Saved cache that the prompt continues. A model's answers to many questions about one document share it."""
    save_cache: str | None = None
    """Directory to create: saves the cache of the prompt there, instead of generating."""
    cache_tokens: int | None = None
    """Maximum number of tokens of prompt and answer. None: the context length that the model was trained for."""
    cache_dtype: Literal["float32", "bfloat16", "int8"] = "bfloat16"
    """Dtype of the cache. int8: with one scale per token and head."""
    dtype: Dtype | None = None
    """Compute dtype. None: bfloat16 on TPU and GPU, float32 on CPU."""
    chunk: int = 2048
    """Number of tokens of the prompt that are computed at a time."""
    mesh: Mesh = field(default_factory=Mesh)

    def __post_init__(self) -> None:
        check_types(self)
        require(self.run is None or self.weights is None, self, "weights", "None if run is given")
        given = self.prompt is None or self.prompt_file is None
        require(given, self, "prompt_file", "None if prompt is given")
        at_least(1, self, "max_tokens", "samples", "chunk", at_most=2**30 - 1)
        require(
            self.cache_tokens is None or 1 <= self.cache_tokens < 2**30, self, "cache_tokens", "at least 1, or None"
        )
        for name in ("cache", "save_cache", "run", "weights"):
            require(vars(self)[name] != "", self, name, "a path, or None")
        require(self.cache is None or self.save_cache is None, self, "save_cache", "None if cache is given")
        require(not self.chat or self.samples == 1, self, "samples", "1 with chat")
        for name in ("cache", "save_cache"):
            require(
                not self.chat or vars(self)[name] is None, self, name, "None with chat, which begins a conversation"
            )
        require("" not in (self.stop or ()), self, "stop", "texts of at least one character")
