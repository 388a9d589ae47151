"""Documents laid end to end and cut into rows. Any row is computed without the rows before it.

An epoch's stream is `boundary t1 ... tn` for each document in that epoch's order. Row i is its window of L tokens
at i * L; every token's target is the stream's next one, so that a row's last target is the first token of the next
row, and a document's last token predicts the boundary that opens the next document.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Batch(NamedTuple):
    """Rows of packed documents, each array [B, L]."""

    tokens: np.ndarray
    """int32."""
    targets: np.ndarray
    """int32: the token that follows in the stream."""
    positions: np.ndarray
    """int32: place in the piece of a document that lies in this row, from 0."""
    segment_ids: np.ndarray
    """int32: number of that piece in this row, from 0."""
    weights: np.ndarray
    """float32: each token's weight in the loss."""


class Corpus(NamedTuple):
    """Token documents end to end, each opened by the boundary; a memory-mapped array serves as well."""

    tokens: np.ndarray
    """[tokens], any integer type."""
    offsets: np.ndarray
    """[documents + 1] int64: document d is tokens[offsets[d]:offsets[d + 1]]."""


def concatenate(documents: Sequence[np.ndarray], boundary: int) -> Corpus:
    """Puts the boundary before each of the `documents` (ids [tokens] of one type that holds it). At least one."""
    lengths = np.array([1 + document.size for document in documents], np.int64)
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    opening = np.array([boundary], documents[0].dtype)
    return Corpus(np.concatenate([part for document in documents for part in (opening, document)]), offsets)


class PackedRows:
    """The rows of `corpus` when its documents come in `order` ([documents], a permutation); `seq_len` tokens each.

    What the end leaves, fewer than `seq_len` tokens, makes no row. The stream is followed by a boundary.
    """

    def __init__(self, corpus: Corpus, seq_len: int, order: np.ndarray):
        self._tokens = corpus.tokens
        self._seq_len = seq_len
        self._sources = corpus.offsets[order]
        # Where each document begins in the stream, and where the last one ends.
        self._bounds = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.diff(corpus.offsets)[order])])

    def __len__(self) -> int:
        return int(self._bounds[-1]) // self._seq_len

    def rows(self, numbers: np.ndarray) -> Batch:
        """The rows `numbers` ([B], from 0) as a batch. Raises IndexError if there is no such row."""
        if np.any((numbers < 0) | (numbers >= len(self))):
            raise IndexError(f"rows {numbers} of {len(self)}")
        first = numbers[:, None] * self._seq_len
        # One more than a row, for the last target; past the stream's end comes a boundary, as at its beginning.
        places = (first + np.arange(self._seq_len + 1)) % self._bounds[-1]
        documents = np.searchsorted(self._bounds, places, side="right") - 1
        begins = self._bounds[documents]
        stream = self._tokens[places - begins + self._sources[documents]].astype(np.int32)
        return Batch(
            tokens=stream[:, :-1],
            targets=stream[:, 1:],
            positions=(places - np.maximum(begins, first))[:, :-1].astype(np.int32),
            segment_ids=(documents - documents[:, :1])[:, :-1].astype(np.int32),
            weights=np.ones((len(numbers), self._seq_len), np.float32),
        )
