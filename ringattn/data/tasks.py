"""Retrieval tasks: a long text, a question about something that is hidden in it, and the answer that follows.

What is hidden, how much of it, and how it is asked for follows the published definitions; the wording is short, so that
a model whose tokens are bytes has room, and the haystack comes with Python. The answer is given and scored, so where a
definition asks for a set, the question says in which order.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from random import Random
from typing import NamedTuple

import numpy as np

from ringattn.data.corpus import Encoded, shared
from ringattn.data.haystack import names, noise, numbers, prose
from ringattn.data.tokenizer import Tokenizer


class Passage(NamedTuple):
    text: str
    question: str
    """The text's continuation; it ends where the answer begins."""
    answers: tuple[str, ...]
    """What follows, one after another."""


Make = Callable[[Random, int, float], Passage]
"""(random, units of haystack, depth of what is asked for, from 0 to 1) -> a passage; for equal `random` the same."""


def _hidden(units: list[str], needles: list[tuple[float, str]], join: str = " ") -> str:
    """The haystack's units with each needle after a share of them, its depth.

    Where units are words, it is moved to the end of a sentence if one is near: within 2 % of the haystack.
    """
    inserts = [(_place(units, round(depth * len(units)), join), needle) for depth, needle in needles]
    parts = list(units)
    # From the end, so that places hold, and those of one place stay in order.
    for place, needle in sorted(inserts, key=lambda insert: insert[0])[::-1]:
        parts.insert(place, needle)
    return join.join(parts)


def _place(units: list[str], place: int, join: str) -> int:
    near = range(place, min(place + len(units) // 50, len(units)) + 1) if join == " " else ()
    return next((end for end in near if end in (0, len(units)) or units[end - 1].endswith(".")), place)


def _depths(random: Random, count: int) -> list[float]:
    """From the beginning to the end."""
    return sorted(random.random() for _ in range(count))


def _listed(answers: list[str]) -> tuple[str, ...]:
    return tuple(f" {each}" if number == 0 else f", {each}" for number, each in enumerate(answers))


def passkey(random: Random, units: int, depth: float) -> Passage:
    """A number in repeated noise (Mohtashami and Jaggi, arXiv 2305.16300)."""
    (key,) = numbers(random, 1, 5)
    needle = f"The pass key is {key}. Remember it. {key} is the pass key."
    return Passage(_hidden(noise(units), [(depth, needle)]), "\nThe pass key is", (f" {key}",))


def _magic(key: str, value: str) -> str:
    return f"The magic number of {key} is {value}."


def needle(random: Random, units: int, depth: float) -> Passage:
    """A needle in a haystack of prose (Kamradt 2023), as a number of seven digits (RULER, arXiv 2404.06654, S-NIAH)."""
    (key,), (value,) = names(random, 1), numbers(random, 1, 7)
    text = _hidden(prose(random, units), [(depth, _magic(key, value))])
    return Passage(text, f"\nThe magic number of {key} is", (f" {value}",))


def multi_key(random: Random, units: int, depth: float) -> Passage:
    """Four needles, of which one is asked for (RULER, MK-NIAH)."""
    keys, values = names(random, 4), numbers(random, 4, 7)
    places = [depth, *_depths(random, 3)]
    needles = [(place, _magic(*pair)) for place, pair in zip(places, zip(keys, values, strict=True), strict=True)]
    return Passage(_hidden(prose(random, units), needles), f"\nThe magic number of {keys[0]} is", (f" {values[0]}",))


def multi_value(random: Random, units: int, depth: float) -> Passage:
    """Four values of one key, all of which are asked for, in the order in which they come (RULER, MV-NIAH)."""
    (key,), values = names(random, 1), numbers(random, 4, 7)
    needles = [(place, _magic(key, value)) for place, value in zip(_depths(random, 4), values, strict=True)]
    question = f"\nThe magic numbers of {key}, in order, are"
    return Passage(_hidden(prose(random, units), needles), question, _listed(values))


def multi_query(random: Random, units: int, depth: float) -> Passage:
    """Four needles, all of which are asked for (RULER, MQ-NIAH)."""
    keys, values = names(random, 4), numbers(random, 4, 7)
    places = [random.random() for _ in keys]
    needles = [(place, _magic(*pair)) for place, pair in zip(places, zip(keys, values, strict=True), strict=True)]
    question = f"\nThe magic numbers of {', '.join(keys[:-1])} and {keys[-1]} are"
    return Passage(_hidden(prose(random, units), needles), question, _listed(values))


def variables(random: Random, units: int, depth: float) -> Passage:
    """Two chains of five variables; asked for are all that hold the first one's value (RULER, variable tracking)."""
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    found: dict[str, None] = {}
    while len(found) < 10:
        found["".join(random.choices(letters, k=5))] = None
    asked, other = list(found)[:5], list(found)[5:]
    values = numbers(random, 2, 5)
    needles = []
    for chain, value in zip((asked, other), values, strict=True):
        held = [value, *(f"VAR {name}" for name in chain[:-1])]
        assignments = [f"VAR {name} = {each}." for name, each in zip(chain, held, strict=True)]
        needles += zip(_depths(random, 5), assignments, strict=True)
    question = f"\nThe variables that hold {values[0]}, in order, are"
    return Passage(_hidden(noise(units), needles), question, _listed(asked))


COMMON = 10
"""Words that common_words asks for."""


def common_words(random: Random, units: int, depth: float) -> Passage:
    """A list of words, of which ten come thirty times, the others three times at most (RULER, CWE).

    Of a list shorter than 600 words the ten are a half.
    """
    often = min(30, 4 + units // (2 * COMMON))
    seldom = max(often // 10, 1)
    others = max(units, COMMON)
    found = names(random, COMMON + others)
    common = found[:COMMON]
    listed = common * often + found[COMMON:] * seldom
    random.shuffle(listed)
    text = " ".join(f"{number}. {word}" for number, word in enumerate(listed, 1))
    return Passage(text, f"\nThe {COMMON} most common words, sorted, are", _listed(sorted(common)))


def frequent_words(random: Random, units: int, depth: float) -> Passage:
    """Coined words whose frequencies fall as 1 / rank**2; the first three are asked for (RULER, FWE)."""
    total = 60 + units
    share = 6 / np.pi**2
    counts: list[int] = []
    while sum(counts) < total:
        counts.append(max(int(total * share / (len(counts) + 1) ** 2), 1))
    coined: dict[str, None] = {}
    while len(coined) < len(counts):
        coined["".join(random.choices("abcdefghijklmnopqrstuvwxyz", k=6))] = None
    listed = [word for word, count in zip(coined, counts, strict=True) for _ in range(count)]
    random.shuffle(listed)
    question = "\nThe three most frequent words, the most frequent first, are"
    return Passage(" ".join(listed), question, _listed(list(coined)[:3]))


def lines(random: Random, units: int, depth: float) -> Passage:
    """A register's content among many (LongChat's lines, Li et al. 2023; Ring Attention, arXiv 2310.01889)."""
    found = dict.fromkeys("-".join(pair) for pair in zip(names(random, 1), names(random, 1), strict=True))
    while len(found) < units + 1:
        found["-".join(names(random, 2))] = None
    values = [random.randrange(1, 50_000) for _ in found]
    each = [f"line {name}: REGISTER_CONTENT is <{value}>" for name, value in zip(found, values, strict=True)]
    text = _hidden(each[1:], [(depth, each[0])], join="\n")
    return Passage(text, f"\nline {next(iter(found))}: REGISTER_CONTENT is", (f" <{values[0]}>",))


PERSONS = ("Mary", "John", "Daniel", "Sandra")
PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
THINGS = ("apple", "football", "milk")


def _moves(random: Random, count: int) -> list[tuple[str, str]]:
    return [(random.choice(PERSONS), random.choice(PLACES)) for _ in range(count)]


def where_person(random: Random, units: int, depth: float) -> Passage:
    """Where somebody went last, of eight moves (bAbI 1, arXiv 1502.05698, among distractors as in arXiv 2406.10149)."""
    moves = _moves(random, 8)
    person = random.choice([person for person, _ in moves])
    facts = [f"{who} went to the {place}." for who, place in moves]
    text = _hidden(prose(random, units), list(zip(_depths(random, 8), facts, strict=True)))
    return Passage(text, f"\nWhere is {person}? In the", (f" {dict(moves)[person]}",))


def where_thing(random: Random, units: int, depth: float) -> Passage:
    """Where something is that somebody took along (bAbI 2: two supporting facts)."""
    person, thing = random.choice(PERSONS), random.choice(THINGS)
    moves = [*_moves(random, 3), (person, random.choice(PLACES)), *_moves(random, 3)]
    facts = [f"{who} went to the {place}." for who, place in moves]
    facts.insert(random.randrange(4), f"{person} took the {thing}.")
    text = _hidden(prose(random, units), list(zip(_depths(random, 8), facts, strict=True)))
    return Passage(text, f"\nWhere is the {thing}? In the", (f" {dict(moves)[person]}",))


TASKS: dict[str, Make] = {
    make.__name__: make
    for make in (
        passkey,
        needle,
        multi_key,
        multi_value,
        multi_query,
        variables,
        common_words,
        frequent_words,
        lines,
        where_person,
        where_thing,
    )
}
DEEP = ("passkey", "needle", "multi_key", "lines")
"""Those where what is asked for lies at a depth of choice."""


class Question(NamedTuple):
    """A row of a task."""

    tokens: np.ndarray
    """[L]: the boundary, then text, question and answers."""
    ends: tuple[int, ...]
    """Where the first answer begins, and where each of them ends: the first is tokens[ends[0] : ends[1]]."""


def question(task: str, tokenizer: Tokenizer, length: int, depth: float, seed: str) -> Question:
    """A row of `length` tokens, the same for the same `seed`, with as much haystack as there is room for.

    What is left of the room, a word's (a line's) or 2 % of a long row, is filled with the end of some prose. Raises
    ValueError if the task does not fit at all.
    """

    def attempt(units: int) -> tuple[Passage, np.ndarray]:
        passage = TASKS[task](Random(f"{task} {seed}"), units, depth)
        return passage, tokenizer.encode("".join([passage.text, passage.question, *passage.answers]).encode())

    low, (passage, tokens) = 0, attempt(0)
    if tokens.size >= length:
        raise ValueError(f"the task {task} needs rows of more than {tokens.size} tokens, not of {length}: use longer")
    high, beyond, per_unit = None, 0, 6.0
    while (high is None or high - low > 1) and length - 1 - tokens.size > length // 50:
        # The haystack grows about evenly.
        guess = max(low + int((length - 1 - tokens.size) / per_unit), low + 1)
        guess = guess if high is None else min(guess, high - 1)
        tried, its = attempt(guess)
        if its.size < length:
            per_unit = max((its.size - tokens.size) / (guess - low), 1.0) if high is None else per_unit
            low, passage, tokens = guess, tried, its
        else:
            high, beyond = guess, its.size
        if high is not None:
            per_unit = max((beyond - tokens.size) / (high - low), 1.0)
    room = length - 1 - tokens.size
    filler = tokenizer.encode((" ".join(prose(Random(seed), room + 1)) + "\n").encode())
    filler = np.resize(filler[::-1], room)[::-1]  # its end
    known = [passage.text + passage.question, *passage.answers[:-1]]
    befores = ["".join(known[: number + 1]) for number in range(len(known))]
    counts = [shared(tokenizer.encode(before.encode()), tokens) for before in befores] + [tokens.size]
    if counts != sorted(set(counts)) or not counts[0]:
        raise ValueError(f"the task {task} cannot be asked by this tokenizer: its tokens run from question to answer")
    whole = np.concatenate([np.array([tokenizer.boundary], tokens.dtype), filler, tokens])
    return Question(whole, tuple(1 + room + count for count in counts))


def check_room(task: str, tokenizer: Tokenizer, length: int, seeds: Iterable[str]) -> None:
    """Raises ValueError if a row of any of `seeds`, without any haystack, has no room in `length` tokens."""
    sizes = []
    for seed in seeds:
        passage = TASKS[task](Random(f"{task} {seed}"), 0, 0.0)
        sizes.append(tokenizer.encode("".join([passage.text, passage.question, *passage.answers]).encode()).size)
    if max(sizes) >= length:
        raise ValueError(f"the task {task} needs rows of more than {max(sizes)} tokens, not of {length}: use longer")


def questions(task: str, tokenizer: Tokenizer, length: int, count: int) -> Iterator[Encoded]:
    """Documents of `length` tokens to train on, at random depths; all but the answers is given, and not learned.

    Raises ValueError as `check_tokenizer` and `question` do.
    """
    check_tokenizer(task, tokenizer)
    for number in range(count):
        seed = f"train {number}"
        depth = min(max(1.1 * Random(seed).random() - 0.05, 0.0), 1.0)  # beginning and end are no rarer than others
        tokens, ends = question(task, tokenizer, length, depth, seed)
        yield Encoded(tokens, ends[0] - 1, hashlib.sha256(tokens.tobytes()).digest(), 0, task)


def check_tokenizer(task: str, tokenizer: Tokenizer) -> None:
    """Raises ValueError if the tokenizer is not for text."""
    if tokenizer.name not in ("bytes", "file"):
        raise ValueError(f"the task {task} is text, but the tokenizer is {tokenizer.name!r}: use one for text")
