"""Rows of retrieval tasks as tokens: text, question and answers in exactly the requested number of tokens."""

import hashlib
from collections.abc import Iterable, Iterator
from random import Random
from typing import NamedTuple

import numpy as np

from ringattn.data.chat import ChatTemplate, align, joined
from ringattn.data.corpus import EncodedDocument, common_prefix
from ringattn.data.haystack import prose
from ringattn.data.tasks import TASKS, Passage
from ringattn.data.text_bytes import Aligned, Corrections, concatenate
from ringattn.data.tokenizer import Tokenizer

INSTRUCTION = "Read the following text, then complete its last sentence.\n\n"
"""Begins the user's message. The text and the question, an unfinished sentence, follow.

The assistant's turn repeats the sentence: models that are asked for a number begin with other words, such as "The",
which exact match would count as wrong.
"""
REQUEST = "Read the following conversation, then answer its last request.\n\n"
"""Begins the user's message if the question is a request. The assistant's turn is then the answer alone."""


class Question(NamedTuple):
    """A row of a task as tokens."""

    tokens: np.ndarray
    """[L]: the start id, then filler, text, question and answers. With a chat template, the prompt and the answers."""
    answer_bounds: tuple[int, ...]
    """Answer i is tokens[answer_bounds[i] : answer_bounds[i + 1]]."""
    corrections: Corrections
    passage: Passage


class _Row(NamedTuple):
    """A passage in a row, encoded. The filler is missing."""

    passage: Passage
    head: np.ndarray
    """[tokens]: precede the filler."""
    message: Aligned
    """With a chat template, what is between the filler and the turn of the assistant; otherwise empty."""
    last: str
    """Text that follows `message` and ends with the answers."""
    encoded: Aligned
    """`last`, encoded."""

    @property
    def size(self) -> int:
        return self.head.size + self.message.ids.size + self.encoded.ids.size


def question(
    task: str, tokenizer: Tokenizer, length: int, depth: float, seed: str, chat: ChatTemplate | None = None
) -> Question:
    """Returns a row of `length` tokens with as much haystack as fits. Deterministic for a given `seed`.

    With a chat template, the message of the user is INSTRUCTION, text and question, and the turn of the assistant is
    question and answers: as in RULER, the answer is the next word of a turn that has begun. See `Passage.lead` for
    questions that are requests. The remaining tokens, less
    than one unit or at most 2% of the row, are filled with prose before the text. Raises ValueError if the task does
    not fit even without a haystack.
    """
    low, row = 0, _attempt(task, tokenizer, 0, depth, seed, chat)
    _check_size(task, row.size, length)
    # Bisect over the units of haystack. Tokens grow about linearly with units, so guess with `per_unit`.
    high, too_long, per_unit = None, 0, 6.0
    while (high is None or high - low > 1) and length - row.size > length // 50:
        guess = max(low + int((length - row.size) / per_unit), low + 1)
        guess = guess if high is None else min(guess, high - 1)
        candidate = _attempt(task, tokenizer, guess, depth, seed, chat)
        if candidate.size <= length:
            per_unit = max((candidate.size - row.size) / (guess - low), 1.0) if high is None else per_unit
            low, row = guess, candidate
        else:
            high, too_long = guess, candidate.size
        if high is not None:
            per_unit = max((too_long - row.size) / (high - low), 1.0)
    filler_size = length - row.size
    filler = tokenizer.encode((" ".join(prose(Random(seed), filler_size + 1)) + "\n").encode())
    filler = np.resize(filler[::-1], filler_size)[::-1]  # the last tokens, which end with the newline
    before, start = row.head.size + filler_size, length - row.encoded.ids.size
    corrections = concatenate([row.message.corrections.shift(before), row.encoded.corrections.shift(start)])
    bounds = tuple(start + bound for bound in _answer_bounds(task, tokenizer, row))
    return Question(
        np.concatenate([row.head, filler, row.message.ids, row.encoded.ids]), bounds, corrections, row.passage
    )


def _attempt(task: str, tokenizer: Tokenizer, units: int, depth: float, seed: str, chat: ChatTemplate | None) -> _Row:
    """Returns a row with `units` units of haystack."""
    passage = TASKS[task](Random(f"{task} {seed}"), units, depth)
    if chat is None:
        before, parts = [tokenizer.start], ["".join(passage[:2]) + passage.lead + "".join(passage.answers)]
    else:
        before, after = chat.frame(passage.text)
        if passage.lead:
            first, *rest = passage.answers
            passage = passage._replace(answers=(first.lstrip(), *rest))
        before = joined([*before, REQUEST if passage.lead else INSTRUCTION])
        turn = ("" if passage.lead else passage.question.lstrip()) + "".join(passage.answers)
        parts = joined([passage.text + passage.question, *after, turn])
    last = str(parts[-1])
    message = align(tokenizer, parts[:-1])
    return _Row(passage, align(tokenizer, before).ids, message, last, tokenizer.align(last.encode()))


def _answer_bounds(task: str, tokenizer: Tokenizer, row: _Row) -> list[int]:
    """Returns the indices in `row.encoded` at which the answers start, and its size."""
    answers, tokens = row.passage.answers, row.encoded.ids
    context = row.last.removesuffix("".join(answers))
    prefixes = [context + "".join(answers[:index]) for index in range(len(answers))]
    bounds = [common_prefix(tokenizer.encode(prefix.encode()), tokens) for prefix in prefixes] + [tokens.size]
    if bounds != sorted(set(bounds)) or (context and not bounds[0]):
        raise ValueError(
            f"the task {task} does not work with this tokenizer, which merges question and answer into one token; "
            "use data.tokenizer=bytes"
        )
    return bounds


def _check_size(task: str, size: int, length: int) -> None:
    if size > length:
        raise ValueError(f"the task {task} requires rows of more than {size - 1} tokens, not {length}; use longer rows")


def check_fits(
    task: str, tokenizer: Tokenizer, length: int, seeds: Iterable[str], chat: ChatTemplate | None = None
) -> None:
    """Raises ValueError unless the task fits in `length` tokens without a haystack for all `seeds`."""
    _check_size(task, max(_attempt(task, tokenizer, 0, 0.0, seed, chat).size for seed in seeds), length)


def questions(task: str, tokenizer: Tokenizer, length: int, count: int) -> Iterator[EncodedDocument]:
    """Yields `count` training documents of `length` tokens at random depths. Masks all but the answers out of the loss.

    Raises ValueError: see `check_tokenizer` and `question`.
    """
    check_tokenizer(task, tokenizer)
    for index in range(count):
        seed = f"train {index}"
        # Draw from a wider range and clip, so that the start and the end are as frequent as other depths.
        depth = min(max(1.1 * Random(seed).random() - 0.05, 0.0), 1.0)
        tokens, bounds, corrections, _ = question(task, tokenizer, length, depth, seed)
        digest = hashlib.sha256(tokens.tobytes()).digest()
        yield EncodedDocument(tokens, bounds[0] - 1, digest, 0, task, f"{task} {index}", corrections)


def check_tokenizer(task: str, tokenizer: Tokenizer) -> None:
    """Raises ValueError unless the tokenizer encodes text."""
    if tokenizer.name not in ("bytes", "file"):
        raise ValueError(
            f"the task {task} is text, which the tokenizer {tokenizer.name!r} cannot encode; "
            "use data.tokenizer=bytes or a tokenizer.json"
        )
