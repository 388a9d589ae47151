"""Haystack text for retrieval tasks, without a download: sentences and words from the manual included in Python."""

import re
from functools import cache
from random import Random

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
"""Filler text that Mohtashami and Jaggi (arXiv 2305.16300) repeat around a passkey."""


@cache
def sentences() -> tuple[str, ...]:
    """Returns about 500 plain sentences without digits. They depend on the version of Python."""
    candidates = re.split(r"(?<=[.!?]) (?=[A-Z])", _manual())
    plain = re.compile(r"[A-Z][A-Za-z ,;'-]{20,160}\.")
    return tuple(dict.fromkeys(sentence for sentence in candidates if plain.fullmatch(sentence)))


@cache
def words() -> tuple[str, ...]:
    """Returns about 2,000 lowercase words of 4 to 9 letters."""
    return tuple(sorted(set(re.findall(r"\b[a-z]{4,9}\b", _manual()))))


@cache
def _manual() -> str:
    from pydoc_data.topics import topics

    return re.sub(r"\s+", " ", " ".join(text for _, text in sorted(topics.items())))


def prose(random: Random, count: int) -> list[str]:
    """Returns `count` words of sentences in random order. Sentences repeat if `count` is large."""
    drawn: list[str] = []
    while len(drawn) < count:
        sample = random.sample(sentences(), min((count - len(drawn)) // 5 + 1, len(sentences())))
        drawn += " ".join(sample).split()
    return drawn[:count]


def noise(count: int) -> list[str]:
    """Returns `count` words of NOISE, repeated cyclically."""
    repeated = NOISE.split()
    return [repeated[index % len(repeated)] for index in range(count)]


def names(random: Random, count: int) -> list[str]:
    """Returns `count` distinct words, or pairs of words if `count` exceeds half of all words."""
    if count <= len(words()) // 2:
        return random.sample(words(), count)
    pairs: dict[str, None] = {}
    while len(pairs) < count:
        pairs["-".join(random.choices(words(), k=2))] = None
    return list(pairs)


def numbers(random: Random, count: int, digits: int) -> list[str]:
    """Returns `count` distinct numbers of `digits` digits, without leading zeros."""
    return list(map(str, random.sample(range(10 ** (digits - 1), 10**digits), count)))
