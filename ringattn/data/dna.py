"""Bases as tokens: A, C, G, T, and N for a base that is not known."""

import hashlib

import numpy as np
from numpy.typing import ArrayLike

from ringattn.data.tokenizer import check_ids

LETTERS = b"ACGTN"
AMBIGUOUS = b"RYSWKMBDHVN"
"""IUPAC's codes for "one of these": all become N (Cornish-Bowden 1985, doi:10.1093/nar/13.9.3021)."""
_BAD = 255


def _table() -> np.ndarray:
    table = np.full(256, _BAD, np.uint8)
    for letters, first in ((LETTERS, 0), (AMBIGUOUS, LETTERS.index(b"N"))):
        for number, letter in enumerate(letters):
            table[[letter, ord(chr(letter).lower())]] = first if letters is AMBIGUOUS else number
    return table


class DnaTokenizer:
    """Every base is a token. Capitals and small letters are one; N is read, but never learned."""

    name = "dna"
    size = len(LETTERS) + 1
    boundary = len(LETTERS)
    unlearned = LETTERS.index(b"N")
    unit = 1
    fingerprint = hashlib.sha256(b"dna:" + LETTERS).hexdigest()
    files: dict[str, bytes] = {}  # noqa: RUF012
    _ids = _table()

    def encode(self, document: bytes) -> np.ndarray:
        """Ids [bases] uint8. Raises ValueError that names the first letter that stands for no base, and its place."""
        ids = self._ids[np.frombuffer(document, np.uint8)]
        bad = np.flatnonzero(ids == _BAD)
        if bad.size:
            letter = chr(document[bad[0]])
            cure = "write U as T" if letter in "Uu" else "bases are A C G T, and IUPAC's codes for unknown ones"
            raise ValueError(f"{letter!r} at place {bad[0] + 1} is no base: {cure}")
        return ids

    def decode(self, ids: ArrayLike) -> str:
        """The letters of `ids` (any shape, read in order), without boundaries; ValueError for an id of no letter."""
        checked = check_ids(ids, self.size)
        return np.frombuffer(LETTERS, np.uint8)[checked[checked != self.boundary]].tobytes().decode()

    def byte_length(self, ids: ArrayLike) -> int:
        """0: a base is no byte of text, so that its loss is given in nats alone."""
        return 0
