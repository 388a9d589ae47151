"""Counts the text bytes of tokens, so that bits per byte refer to the source text before encoding.

Most ids always represent the same bytes. The other tokens are stored as corrections: unknown tokens, and tokens of text
that a normalizer changed.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Corrections(NamedTuple):
    """Tokens whose number of text bytes differs from the usual number of their id."""

    positions: np.ndarray
    """[n] int64, ascending: indices of tokens."""
    counts: np.ndarray
    """[n] int32: number of bytes of each of these tokens."""

    def table(self) -> np.ndarray:
        """Returns the corrections as [n] of dtype TABLE, to be stored."""
        table = np.zeros(self.positions.size, TABLE)
        table["position"], table["count"] = self
        return table

    def shift(self, offset: int) -> "Corrections":
        """Adds `offset` to the positions. Most documents have no corrections, and share one empty array."""
        return self._replace(positions=self.positions + offset) if self.positions.size else self


TABLE = np.dtype([("position", "<i8"), ("count", "<i4")])
NO_CORRECTIONS = Corrections(np.zeros(0, np.int64), np.zeros(0, np.int32))


def from_table(table: np.ndarray, tokens: int) -> Corrections | None:
    """Returns the corrections in `table`, of dtype TABLE, for a number of `tokens`; None if the table is not valid."""
    positions, counts = (np.ascontiguousarray(table[field]) for field in ("position", "count"))
    in_range = not positions.size or (positions[0] >= 0 and positions[-1] < tokens)
    is_valid = in_range and np.all(np.diff(positions) > 0) and np.all(counts >= 0)
    return Corrections(positions, counts) if is_valid else None


def concatenate(parts: Sequence[Corrections]) -> Corrections:
    """Returns the corrections of all `parts` (at least one)."""
    return Corrections(*map(np.concatenate, zip(*parts, strict=True)))


class Aligned(NamedTuple):
    """An encoded document."""

    ids: np.ndarray
    """[tokens], of an integer dtype."""
    corrections: Corrections = NO_CORRECTIONS


class TextBytes(NamedTuple):
    """Number of bytes of each token of a corpus."""

    per_id: np.ndarray
    """[vocabulary] int32."""
    corrections: Corrections = NO_CORRECTIONS

    def of(self, positions: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """Returns the number of bytes, int32, of the tokens `ids` at `positions` of the corpus (equal shapes)."""
        counts, corrected = self.per_id[ids], self.corrections
        if not corrected.positions.size:
            return counts
        nearest = np.minimum(np.searchsorted(corrected.positions, positions), corrected.positions.size - 1)
        return np.where(corrected.positions[nearest] == positions, corrected.counts[nearest], counts)


def counted(document: bytes, offsets: np.ndarray, hidden: np.ndarray) -> np.ndarray:
    """Returns the number of bytes of the UTF-8 text `document` per token: [tokens] int32.

    A token represents the bytes from the end of the preceding token to its own end, so the counts sum to the length of
    the document. `offsets`: [tokens, 2], first and last character (exclusive) of each token. `hidden`: indices of
    characters in no token that belong to the preceding token, such as an accent that was composed with its letter.
    """
    starts = np.append(_character_starts(document), len(document))  # byte offset of each character
    ends = np.maximum.accumulate(offsets[:, 1])
    if hidden.size:
        visible = np.delete(np.arange(starts.size), hidden)
        ends = visible[np.searchsorted(visible, ends)]
    ends[-1:] = starts.size - 1
    return np.diff(starts[ends], prepend=0).astype(np.int32)


def uncovered(document: bytes, offsets: np.ndarray) -> np.ndarray:
    """Returns the indices of the characters of `document` in no token: [n] int64. `offsets`: see `counted`."""
    characters = _character_starts(document).size
    depth = np.bincount(offsets[:, 0], minlength=characters + 1) - np.bincount(offsets[:, 1], minlength=characters + 1)
    return np.flatnonzero(np.cumsum(depth)[:characters] == 0)


def _character_starts(document: bytes) -> np.ndarray:
    return np.flatnonzero((np.frombuffer(document, np.uint8) & 0xC0) != 0x80)
