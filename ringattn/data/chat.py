"""Chat templates: the prompt of an instruct model around a user's message, as token ids.

A template writes the names of special tokens, which become their ids. The message is plain text: names of special
tokens in it do not become ids, so that a document cannot add a turn to the conversation.
"""

import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from ringattn.data.text_bytes import Aligned, concatenate
from ringattn.data.tokenizer import Tokenizer

Part = str | int
"""Text, or the id of a special token."""

MAX_PROMPT = 2**16
"""Maximum number of characters that a template may add to the message."""
CPU_SECONDS, MEMORY, WALL_SECONDS = 5, 2**30, 120
"""Limits of the process that renders a template. Time on the clock is generous for busy machines."""
_MESSAGE = "0b6e1f3d9a27-the-message-of-the-user-4c85d2e7a910"
_ANSWER = "5d20c7e4b1f8-the-answer-of-the-model-93e1a6f07c2b"
_FIRST = "e8f19b3c6a04-an-earlier-message-7b52d0c9e1f6"


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja template of a model, such as its chat_template.jinja. Its content is not trusted."""

    template: str
    source: str
    """The file that the template comes from, in messages."""
    tokens: Mapping[str, int]
    """Ids of the tokenizer's special tokens by name."""
    plain_tokens: frozenset[str] = frozenset()
    """Names of added tokens that are not special. The tokenizer finds them in every text."""
    variables: Mapping[str, str | bool] | None = None
    """Variables of the template, such as bos_token."""

    def frame(self, message: str) -> tuple[list[Part], list[Part]]:
        """Returns the parts of the prompt before and after `message`, with the beginning of the assistant's turn.

        Raises ValueError if the template cannot be used, or if `message` has the name of a token of the template that
        is not special.
        """
        before, after = self._frame
        added = next((name for name in self._turns if name in message), None)
        if added is not None:
            problem = f"the message contains {added!r}, which marks a turn in {self.source}, but is no special token"
            raise ValueError(f"{problem}; remove it from the message")
        return before, after

    def around(self, message: str) -> list[Part]:
        """Returns all parts of the prompt. Neighbouring texts are joined. Raises ValueError: see `frame`."""
        before, after = self.frame(message)
        return joined([*before, message, *after])

    def encode_prompt(self, tokenizer: Tokenizer, message: str) -> np.ndarray:
        """Returns the ids [tokens] of the prompt. It has no other BOS than the template's own. Raises ValueError."""
        return align(tokenizer, self.around(message)).ids

    def encode_turn(self, tokenizer: Tokenizer, message: str, last: int) -> np.ndarray:
        """Returns the ids [tokens] of a later turn: what follows an answer, `message`, and the next answer's beginning.

        `last` is the last token of the answer. If it is the token with which the template ends a turn, that is not
        repeated. Raises ValueError: see `frame`.
        """
        self.frame(message)
        between, after = self._turn_frame
        parts = joined([*between, message, *after])
        return align(tokenizer, parts[1:] if parts[0] == last else parts).ids

    def check(self, tokenizer: Tokenizer) -> None:
        """Raises ValueError if the template cannot be used, or if `encode_prompt` differs from transformers."""
        sample = "What is the answer to 1 + 1?"
        prompt = self.around(sample)
        if "tokenizer.json" not in tokenizer.files:
            fix = "evaluate with --chat False"
            raise ValueError(f"{self.source} requires a tokenizer.json, not the tokenizer {tokenizer.name!r}; {fix}")
        import tokenizers

        names = {number: name for name, number in self.tokens.items()}
        text = "".join(part if isinstance(part, str) else names[part] for part in prompt)
        reference = tokenizers.Tokenizer.from_buffer(tokenizer.files["tokenizer.json"])
        reference.no_truncation()
        reference.no_padding()
        if reference.encode(text, add_special_tokens=False).ids != align(tokenizer, prompt).ids.tolist():
            problem = "the tokenizer changes the text next to special tokens, which is not supported"
            raise ValueError(f"{self.source}: {problem}; evaluate with --chat False")

    @cached_property
    def _frame(self) -> tuple[list[Part], list[Part]]:
        """The parts before and after the message."""
        before, after = self._pieces([_MESSAGE])
        return before, after

    @cached_property
    def _turn_frame(self) -> tuple[list[Part], list[Part]]:
        """The parts between an answer and the next message, and after that."""
        _, _, between, after = self._pieces([_FIRST, _ANSWER, _MESSAGE])
        return between, after

    def _pieces(self, contents: Sequence[str]) -> list[list[Part]]:
        """Returns the parts around the contents of a conversation, which the user begins."""
        text = rest = self._render(contents)
        found = []
        for content in contents:
            if text.count(content) != 1:
                raise self._error(f"contains the message of the user {text.count(content)} times, not once")
            if content not in rest:
                raise self._error("changes the order of the messages")
            piece, rest = rest.split(content)
            found.append(piece)
        if len(text) > MAX_PROMPT:
            raise self._error(f"adds {len(text):,} characters to the message, more than {MAX_PROMPT:,}")
        return [split_special(piece, self.tokens) for piece in (*found, rest)]

    @cached_property
    def _turns(self) -> list[str]:
        """Names of the tokens of the template that are not special."""
        texts = [part for parts in self._frame for part in parts if isinstance(part, str)]
        return [name for name in self.plain_tokens if any(name in text for text in texts)]

    def _render(self, contents: Sequence[str]) -> str:
        """Returns the prompt for a conversation, rendered in a process of its own."""
        # Without thinking, the answer follows the prompt directly.
        variables = {"add_generation_prompt": True, "tools": None, "documents": None, "enable_thinking": False}
        roles = ("user", "assistant")
        messages = [{"role": roles[turn % 2], "content": content} for turn, content in enumerate(contents)]
        variables |= {"messages": messages, **(self.variables or {})}
        request = {"template": self.template, "variables": variables, "limits": [CPU_SECONDS, MEMORY]}
        program = [sys.executable, "-P", str(Path(__file__).with_name("chat_render.py"))]
        try:
            done = subprocess.run(
                program, input=json.dumps(request).encode(), capture_output=True, timeout=WALL_SECONDS
            )
            answer = json.loads(done.stdout)
        except subprocess.TimeoutExpired:
            raise self._error(f"does not end within {WALL_SECONDS} seconds") from None
        except ValueError:  # the process was killed
            raise self._error(f"takes more than {CPU_SECONDS} seconds of CPU time or {MEMORY:,} bytes") from None
        if "missing" in answer:
            fix = "run pip install 'ringattn[weights]'"
            raise ValueError(f"{self.source} requires the package jinja2 (3.1.6 or newer); {fix}")
        if "error" in answer:
            raise self._error(f"fails ({answer['error'].splitlines()[0][:200]})")
        return answer["text"]

    def _error(self, problem: str) -> ValueError:
        return ValueError(
            f"{self.source}: the chat template {problem}; use another file, or evaluate with --chat False"
        )


def split_special(text: str, tokens: Mapping[str, int]) -> list[Part]:
    """Splits `text` at the names of special tokens, the longest name first, and replaces the names by their ids."""
    if not tokens:
        return [text]
    names = "|".join(re.escape(name) for name in sorted(tokens, key=len, reverse=True))
    return [tokens.get(piece, piece) for piece in re.split(f"({names})", text) if piece]


def joined(parts: Sequence[Part]) -> list[Part]:
    """Joins neighbouring texts, because a token may span them, and leaves out empty ones."""
    found: list[Part] = []
    for part in parts:
        if isinstance(part, str) and found and isinstance(found[-1], str):
            found[-1] += part
        elif part != "":
            found.append(part)
    return found


def align(tokenizer: Tokenizer, parts: Sequence[Part]) -> Aligned:
    """Encodes parts one after another. Special tokens have no text bytes. Raises ValueError for invalid text."""
    dtype = np.uint16 if tokenizer.size <= 2**16 else np.int32
    encoded, start = [Aligned(np.zeros(0, dtype))], 0
    for part in parts:
        each = tokenizer.align(part.encode()) if isinstance(part, str) else Aligned(np.array([part], dtype))
        encoded.append(Aligned(each.ids, each.corrections.shift(start)))
        start += each.ids.size
    ids = np.concatenate([each.ids for each in encoded])
    return Aligned(ids, concatenate([each.corrections for each in encoded]))
