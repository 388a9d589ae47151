"""Prompts as token ids, and the tokens and strings that end an answer."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Int

from ringattn.data import Tokenizer
from ringattn.data.chat import ChatTemplate
from ringattn.weights import Loaded
from ringattn.weights.chat_template import read_chat_template

Prompt = str | Sequence[int] | np.ndarray
"""Text, or token ids."""


@dataclass(frozen=True)
class Texts:
    """The tokenizer of a model, and the ids that begin and end its texts."""

    tokenizer: Tokenizer | None
    """None: prompts are ids, and answers have no text."""
    vocabulary: int
    start: tuple[int, ...]
    """Ids before a text."""
    ends: frozenset[int]
    """Ids that end an answer."""
    no_tokenizer: str = ""
    """Reason why `tokenizer` is None."""
    chat: ChatTemplate | None = None
    """The chat template, if the model has one."""

    @classmethod
    def of(cls, loaded: Loaded) -> "Texts":
        """Returns the texts of a loaded model. Raises ValueError if its files contradict each other.

        A run trains only the ids of its tokenizer, which can be fewer than the model has.
        """
        vocabulary = loaded.config.vocabulary if loaded.run_tokenizer is None else loaded.run_tokenizer.size
        assert vocabulary is not None
        try:
            tokenizer, problem = loaded.tokenizer.documents, ""
        except ValueError as error:
            tokenizer, problem = None, str(error)
        named = loaded.details.end_ids()
        texts = cls.of_tokenizer(tokenizer, vocabulary, named, loaded.run_tokenizer is not None, problem)
        return replace(texts, chat=read_chat_template(loaded.details.files, loaded.path))

    @classmethod
    def of_tokenizer(
        cls, tokenizer: Tokenizer | None, vocabulary: int, ends: frozenset[int], rows: bool, problem: str = ""
    ) -> "Texts":
        """`rows`: the model was trained here, on rows in which every document begins with the boundary or the start."""
        start: tuple[int, ...] = ()
        if tokenizer is not None:
            if rows or tokenizer.start != tokenizer.boundary:
                start = (tokenizer.start,)
            if rows or not ends:
                ends |= {tokenizer.boundary}
        return cls(tokenizer, vocabulary, start, frozenset(x for x in ends if 0 <= x < vocabulary), problem)

    def ids(self, prompt: Prompt, *, continues: bool = False) -> Int[np.ndarray, " tokens"]:
        """Returns the ids int32 of a prompt; without `start` if it `continues` a text.

        Raises ValueError for an id outside the vocabulary, and for a text without tokenizer.
        """
        if isinstance(prompt, str):
            encoded = self._checked(self._tokenizer().encode(_utf8(prompt)).astype(np.int32))
            return (
                encoded if continues or not encoded.size else np.concatenate([np.array(self.start, np.int32), encoded])
            )
        ids = np.asarray(prompt)
        if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
            raise ValueError(f"prompt {ids.dtype}{list(ids.shape)} must be a text, or a list of ids")
        return self._checked(ids).astype(np.int32)

    def _checked(self, ids: np.ndarray) -> np.ndarray:
        outside = ids[(ids < 0) | (ids >= self.vocabulary)]
        if outside.size:
            rule = f"must be from 0 to {self.vocabulary - 1}, the vocabulary of the model"
            raise ValueError(f"token id {outside[0]} {rule}; use the tokenizer of the model")
        return ids

    def chat_ids(self, message: str, last: int | None = None) -> Int[np.ndarray, " tokens"]:
        """Returns the ids of a message in the chat template, up to the beginning of the answer.

        `last` is the last token of the previous answer; None for the first message. Raises ValueError without a
        template, and for an empty message.
        """
        tokenizer = self._tokenizer()
        if self.chat is None:
            raise ValueError("the model has no chat template; use an instruct model, or prompts without chat")
        if not message.strip():
            raise ValueError("the message is empty; write at least one word")
        _utf8(message)
        chat = self.chat
        if last is None:
            chat.check(tokenizer)
        ids = chat.encode_prompt(tokenizer, message) if last is None else chat.encode_turn(tokenizer, message, last)
        return self._checked(ids.astype(np.int32))

    def decode(self, ids: np.ndarray) -> str:
        """Returns the text of ids; "" without tokenizer. Ids beyond the tokenizer's have no text."""
        if self.tokenizer is None:
            return ""
        return self.tokenizer.decode(ids[ids < self.tokenizer.size])

    def stops(self, stop: Sequence[str | int]) -> tuple[tuple[str, ...], frozenset[int]]:
        """Returns the strings and the ids that end an answer. Raises ValueError for an empty or unknown one."""
        if isinstance(stop, str | int):
            raise ValueError(f"stop={stop!r} must be a list of strings and ids; use [{stop!r}]")
        strings, ids = tuple(x for x in stop if isinstance(x, str)), [x for x in stop if not isinstance(x, str)]
        if not all(isinstance(x, int | np.integer) for x in ids):
            raise ValueError(f"stop={stop!r} must be a list of strings and ids")
        if "" in strings:
            raise ValueError("stop: '' would end every answer at once; leave it out")
        if strings:
            self._tokenizer()
        for number in ids:
            if not 0 <= number < self.vocabulary:
                raise ValueError(f"stop: {number} must be from 0 to {self.vocabulary - 1}, an id of the vocabulary")
        special = {} if self.chat is None else self.chat.tokens  # which have no text
        named = {special[text] for text in strings if text in special}
        return tuple(x for x in strings if x not in special), self.ends | named | {int(x) for x in ids}

    def _tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise ValueError(f"{self.no_tokenizer or 'the model has no tokenizer'}; use lists of ids as prompts")
        return self.tokenizer


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        where = f"character {error.start} ({text[error.start]!a})"
        raise ValueError(f"the prompt is not valid Unicode at {where}; save the text as UTF-8") from None
