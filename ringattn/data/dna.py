"""Tokenizer for DNA: A, C, G, T, and N for an unknown base."""

import hashlib

import numpy as np
from numpy.typing import ArrayLike

from ringattn.data.text_bytes import Aligned
from ringattn.data.tokenizer import check_ids

LETTERS = b"ACGTN"
AMBIGUOUS = b"RYSWKMBDHVN"
"""IUPAC codes for ambiguous bases; all are encoded as N (Cornish-Bowden 1985, doi:10.1093/nar/13.9.3021)."""
_INVALID = 255


def _table() -> np.ndarray:
    table = np.full(256, _INVALID, np.uint8)
    ids = dict.fromkeys(AMBIGUOUS, LETTERS.index(b"N")) | {letter: index for index, letter in enumerate(LETTERS)}
    for letter, index in ids.items():
        table[[letter, ord(chr(letter).lower())]] = index
    return table


class DnaTokenizer:
    """One token per base, in upper or lower case. Targets N are masked out of the loss."""

    name = "dna"
    size = len(LETTERS) + 1
    boundary = start = len(LETTERS)
    ignored_id = LETTERS.index(b"N")
    unit = 1
    fingerprint = hashlib.sha256(b"dna:" + LETTERS).hexdigest()
    files: dict[str, bytes] = {}  # noqa: RUF012
    byte_lengths = np.zeros(size, np.int32)  # bases are not bytes of text, so the loss is reported only in nats
    _ids = _table()

    def encode(self, document: bytes) -> np.ndarray:
        """Returns ids [bases] uint8. Raises ValueError with the first invalid letter and its position."""
        ids = self._ids[np.frombuffer(document, np.uint8)]
        invalid = np.flatnonzero(ids == _INVALID)
        if invalid.size:
            letter = chr(document[invalid[0]])
            fix = "write U as T" if letter in "Uu" else "use A, C, G, T, or an IUPAC code for an ambiguous base"
            raise ValueError(f"{letter!r} at position {invalid[0] + 1} is not a base; {fix}")
        return ids

    def align(self, document: bytes) -> Aligned:
        return Aligned(self.encode(document))

    def decode(self, ids: ArrayLike) -> str:
        """Returns the letters of `ids` (any shape, flattened), without boundaries.

        Raises ValueError for an id outside the vocabulary.
        """
        checked = check_ids(ids, self.size)
        return np.frombuffer(LETTERS, np.uint8)[checked[checked != self.boundary]].tobytes().decode()
