"""Text to hide something in, without a download: sentences and words of the Python manual that comes with Python."""

import re
from functools import cache
from random import Random

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
"""What Mohtashami and Jaggi (arXiv 2305.16300) repeat around a passkey."""


@cache
def sentences() -> tuple[str, ...]:
    """Plain sentences without a digit, some 500; other versions of Python have some others."""
    found = re.split(r"(?<=[.!?]) (?=[A-Z])", _manual())
    return tuple(dict.fromkeys(each for each in found if re.fullmatch(r"[A-Z][A-Za-z ,;'-]{20,160}\.", each)))


@cache
def words() -> tuple[str, ...]:
    """Small words of 4 to 9 letters, some 2,000."""
    return tuple(sorted(set(re.findall(r"\b[a-z]{4,9}\b", _manual()))))


@cache
def _manual() -> str:
    from pydoc_data.topics import topics

    return re.sub(r"\s+", " ", " ".join(text for _, text in sorted(topics.items())))


def prose(random: Random, count: int) -> list[str]:
    """`count` words of sentences in a random order; none comes twice before all have come once."""
    found: list[str] = []
    while len(found) < count:
        some = random.sample(sentences(), min((count - len(found)) // 5 + 1, len(sentences())))
        found += " ".join(some).split()
    return found[:count]


def noise(count: int) -> list[str]:
    """`count` words of NOISE, again and again."""
    known = NOISE.split()
    return [known[number % len(known)] for number in range(count)]


def names(random: Random, count: int) -> list[str]:
    """`count` different words, or pairs of words where there are not as many."""
    if count <= len(words()) // 2:
        return random.sample(words(), count)
    found: dict[str, None] = {}
    while len(found) < count:
        found["-".join(random.choices(words(), k=2))] = None
    return list(found)


def numbers(random: Random, count: int, digits: int) -> list[str]:
    """`count` different numbers of so many digits, the first of them no zero."""
    return list(map(str, random.sample(range(10 ** (digits - 1), 10**digits), count)))
