"""Retrieval tasks: a long text (the haystack) with inserted facts (the needles), a question about them, and the answer.

Needles and questions follow the published definitions. The wording is shorter, so that a task fits in few byte tokens,
and the haystack is text that ships with Python. The answer can be scored with teacher forcing. If a definition asks for
a set, the question therefore states an order.
"""

from collections.abc import Callable
from itertools import product
from random import Random
from string import ascii_letters, digits
from typing import NamedTuple

import numpy as np

from ringattn.data.haystack import names, noise, numbers, prose


class Passage(NamedTuple):
    text: str
    question: str
    """Appended to the text; ends where the first answer starts."""
    answers: tuple[str, ...]
    """Appended to the question, one after another."""
    lead: str = ""
    """Text between question and answers. Without it, the question is a sentence that the answers complete; with it, the
    question is a request, and in a chat template the turn of the assistant begins with the answers."""


Make = Callable[[Random, int, float], Passage]
"""(random, units of haystack, depth of the queried needle from 0 to 1) -> passage; deterministic for equal `random`."""


def _hide(units: list[str], needles: list[tuple[float, str]], join: str = " ") -> str:
    """Joins the units of the haystack, with each needle inserted at its depth, a fraction of the units.

    In prose, a needle moves to the end of the sentence if that is within 2% of the haystack.
    """
    inserts = [(_insert_index(units, round(depth * len(units)), join), needle) for depth, needle in needles]
    text = list(units)
    # Insert from the end, so that earlier indices stay valid and needles with equal index keep their order.
    for index, needle in sorted(inserts, key=lambda insert: insert[0])[::-1]:
        text.insert(index, needle)
    return join.join(text)


def _insert_index(units: list[str], index: int, join: str) -> int:
    near = range(index, min(index + len(units) // 50, len(units)) + 1) if join == " " else ()
    return next((end for end in near if end in (0, len(units)) or units[end - 1].endswith(".")), index)


def _depths(random: Random, count: int) -> list[float]:
    """Returns `count` random depths, sorted."""
    return sorted(random.random() for _ in range(count))


def _listed(answers: list[str]) -> tuple[str, ...]:
    """Returns the answers, each prefixed with its separator."""
    return tuple(f" {answer}" if index == 0 else f", {answer}" for index, answer in enumerate(answers))


def passkey(random: Random, units: int, depth: float) -> Passage:
    """A number in repeated filler text (Mohtashami and Jaggi, arXiv 2305.16300)."""
    (key,) = numbers(random, 1, 5)
    needle = f"The pass key is {key}. Remember it. {key} is the pass key."
    return Passage(_hide(noise(units), [(depth, needle)]), "\nThe pass key is", (f" {key}",))


def _magic(key: str, value: str) -> str:
    return f"The magic number of {key} is {value}."


def needle(random: Random, units: int, depth: float) -> Passage:
    """A seven-digit number in prose (needle in a haystack, Kamradt 2023; S-NIAH of RULER, arXiv 2404.06654)."""
    (key,), (value,) = names(random, 1), numbers(random, 1, 7)
    text = _hide(prose(random, units), [(depth, _magic(key, value))])
    return Passage(text, f"\nThe magic number of {key} is", (f" {value}",))


def multi_key(random: Random, units: int, depth: float) -> Passage:
    """Four needles with different keys; the question asks for one (RULER, MK-NIAH)."""
    keys, values = names(random, 4), numbers(random, 4, 7)
    depths = [depth, *_depths(random, 3)]
    needles = [(depth, _magic(*pair)) for depth, pair in zip(depths, zip(keys, values, strict=True), strict=True)]
    return Passage(_hide(prose(random, units), needles), f"\nThe magic number of {keys[0]} is", (f" {values[0]}",))


def multi_value(random: Random, units: int, depth: float) -> Passage:
    """Four values of one key; the question asks for all, in order of appearance (RULER, MV-NIAH)."""
    (key,), values = names(random, 1), numbers(random, 4, 7)
    needles = [(depth, _magic(key, value)) for depth, value in zip(_depths(random, 4), values, strict=True)]
    question = f"\nThe magic numbers of {key}, in order, are"
    return Passage(_hide(prose(random, units), needles), question, _listed(values))


def multi_query(random: Random, units: int, depth: float) -> Passage:
    """Four needles with different keys; the question asks for all (RULER, MQ-NIAH)."""
    keys, values = names(random, 4), numbers(random, 4, 7)
    depths = [random.random() for _ in keys]
    needles = [(depth, _magic(*pair)) for depth, pair in zip(depths, zip(keys, values, strict=True), strict=True)]
    question = f"\nThe magic numbers of {', '.join(keys[:-1])} and {keys[-1]} are"
    return Passage(_hide(prose(random, units), needles), question, _listed(values))


def variables(random: Random, units: int, depth: float) -> Passage:
    """Two chains of five variables; the question asks for those with the value of the first chain (RULER, VT)."""
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    drawn: dict[str, None] = {}
    while len(drawn) < 10:
        drawn["".join(random.choices(letters, k=5))] = None
    asked, other = list(drawn)[:5], list(drawn)[5:]
    values = numbers(random, 2, 5)
    needles = []
    for chain, value in zip((asked, other), values, strict=True):
        sources = [value, *(f"VAR {name}" for name in chain[:-1])]
        assignments = [f"VAR {name} = {source}." for name, source in zip(chain, sources, strict=True)]
        needles += zip(_depths(random, 5), assignments, strict=True)
    question = f"\nThe variables that hold {values[0]}, in order, are"
    return Passage(_hide(noise(units), needles), question, _listed(asked))


COMMON = 10
"""Number of words in the answer of common_words."""


def common_words(random: Random, units: int, depth: float) -> Passage:
    """A list in which ten words occur thirty times each, the others at most three times (RULER, CWE).

    With fewer than 520 other words, all words occur less often, so that the list fits in short rows.
    """
    common_repeats = min(30, 4 + units // (2 * COMMON))
    other_repeats = max(common_repeats // 10, 1)
    others = max(units, COMMON)
    drawn = names(random, COMMON + others)
    common = drawn[:COMMON]
    listed = common * common_repeats + drawn[COMMON:] * other_repeats
    random.shuffle(listed)
    text = " ".join(f"{index}. {word}" for index, word in enumerate(listed, 1))
    return Passage(text, f"\nThe {COMMON} most common words, sorted, are", _listed(sorted(common)))


def frequent_words(random: Random, units: int, depth: float) -> Passage:
    """Random words with frequencies proportional to 1 / rank**2; the question asks for the top three (RULER, FWE)."""
    total = 60 + units
    scale = 6 / np.pi**2  # normalizes the frequencies
    counts: list[int] = []
    while sum(counts) < total:
        counts.append(max(int(total * scale / (len(counts) + 1) ** 2), 1))
    drawn: dict[str, None] = {}
    while len(drawn) < len(counts):
        drawn["".join(random.choices("abcdefghijklmnopqrstuvwxyz", k=6))] = None
    listed = [word for word, count in zip(drawn, counts, strict=True) for _ in range(count)]
    random.shuffle(listed)
    question = "\nThe three most frequent words, the most frequent first, are"
    return Passage(" ".join(listed), question, _listed(list(drawn)[:3]))


def lines(random: Random, units: int, depth: float) -> Passage:
    """The content of one of many registers (LongChat lines, Li et al. 2023; Ring Attention, arXiv 2310.01889)."""
    drawn = dict.fromkeys("-".join(pair) for pair in zip(names(random, 1), names(random, 1), strict=True))
    while len(drawn) < units + 1:
        drawn["-".join(names(random, 2))] = None
    values = [random.randrange(1, 50_000) for _ in drawn]
    asked, *others = (f"line {name}: REGISTER_CONTENT is <{value}>" for name, value in zip(drawn, values, strict=True))
    text = _hide(others, [(depth, asked)], join="\n")
    return Passage(text, f"\nline {next(iter(drawn))}: REGISTER_CONTENT is", (f" <{values[0]}>",))


PERSONS = ("Mary", "John", "Daniel", "Sandra")
PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
THINGS = ("apple", "football", "milk")


def _moves(random: Random, count: int) -> list[tuple[str, str]]:
    return [(random.choice(PERSONS), random.choice(PLACES)) for _ in range(count)]


def where_person(random: Random, units: int, depth: float) -> Passage:
    """A person's location after eight moves (bAbI 1, arXiv 1502.05698, with distractors as in arXiv 2406.10149)."""
    moves = _moves(random, 8)
    person = random.choice([person for person, _ in moves])
    facts = [f"{who} went to the {place}." for who, place in moves]
    text = _hide(prose(random, units), list(zip(_depths(random, 8), facts, strict=True)))
    return Passage(text, f"\nWhere is {person}? In the", (f" {dict(moves)[person]}",))


def where_thing(random: Random, units: int, depth: float) -> Passage:
    """The location of a thing that a person carries (bAbI 2: two supporting facts)."""
    person, thing = random.choice(PERSONS), random.choice(THINGS)
    moves = [*_moves(random, 3), (person, random.choice(PLACES)), *_moves(random, 3)]
    facts = [f"{who} went to the {place}." for who, place in moves]
    facts.insert(random.randrange(4), f"{person} took the {thing}.")
    text = _hide(prose(random, units), list(zip(_depths(random, 8), facts, strict=True)))
    return Passage(text, f"\nWhere is the {thing}? In the", (f" {dict(moves)[person]}",))


FORMS = ("letter", "poem", "report", "song", "speech", "story")
TOPICS = ("bridges", "clouds", "harvests", "islands", "markets", "rivers", "trains", "winters")
REQUESTS, RESPONSE_WORDS = 4, 12
"""Number of equal requests of mrcr, and of words in each response."""
PREFIX = 10
"""Number of characters that the answer of mrcr begins with."""


def _turns(random: Random, form: str, topic: str) -> str:
    """Returns a request, and a response that is any words of prose, so that a response does not show its request."""
    return f"User: Write a {form} about {topic}.\nAssistant: {' '.join(prose(random, RESPONSE_WORDS))}"


def mrcr(random: Random, units: int, depth: float) -> Passage:
    """The response to the n-th of four equal requests in a long conversation, after a random prefix.

    A variant of OpenAI's MRCR (huggingface.co/datasets/openai/mrcr, after arXiv 2409.12640): there, a language model
    wrote the responses, which are longer. Other requests ask for another form or topic.
    """
    asked = random.choice(FORMS), random.choice(TOPICS)
    needles = [_turns(random, *asked) for _ in range(REQUESTS)]
    number, depths = random.randrange(REQUESTS), _depths(random, REQUESTS)
    prefix = "".join(random.choices(ascii_letters + digits, k=PREFIX))
    others = [pair for pair in product(FORMS, TOPICS) if pair != asked]
    turns = [_turns(random, *random.choice(others)) for _ in range(units)]
    text = _hide(turns, list(zip(depths, needles, strict=True)), join="\n")
    ordinal = ("1st", "2nd", "3rd", "4th")[number]
    request = f"Prepend {prefix} to the {ordinal} (1 indexed) {asked[0]} about {asked[1]}."
    question = f"\nUser: {request} Do not include any other text in your response."
    response = needles[number].split("Assistant: ")[1]
    return Passage(text, question, (f" {prefix}{response}",), "\nAssistant:")


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
        mrcr,
    )
}
DEPTH_TASKS = ("passkey", "needle", "multi_key", "lines")
"""Tasks that insert the queried needle at a given depth."""
