"""Documents laid end to end and cut into rows. Any row is computed without the rows before it.

An epoch's stream is the corpus's pieces in that epoch's order; a whole document is `boundary t1 ... tn`. Row i is the
stream's window of L tokens at i * L. Every token's target is the next one of its own document, which for the last
token is a boundary.
"""

from typing import NamedTuple

import numpy as np

from ringattn.data.corpus import Corpus


class Batch(NamedTuple):
    """Rows of packed documents, each array [B, L]."""

    tokens: np.ndarray
    """int32."""
    targets: np.ndarray
    """int32: the token that follows in the document."""
    positions: np.ndarray
    """int32: place in the piece of a document that lies in this row, from 0."""
    segment_ids: np.ndarray
    """int32: number of that piece in this row, from 0."""
    weights: np.ndarray
    """float32: each token's weight in the loss: 1, or 0 where the target is given and not to be learned."""


class PackedRows:
    """The rows of `corpus` when its pieces come in `order` ([pieces], a permutation); `seq_len` tokens each.

    What the end leaves, fewer than `seq_len` tokens, makes no row.
    """

    def __init__(self, corpus: Corpus, seq_len: int, order: np.ndarray):
        self._tokens, self._unlearned = corpus.tokens, corpus.unlearned
        self._seq_len = seq_len
        self._sources, self._contexts = corpus.starts[order], corpus.contexts[order]
        # Where each piece begins in the stream, and where the last one ends.
        self._bounds = np.concatenate([np.zeros(1, np.int64), np.cumsum(corpus.lengths[order])])

    def __len__(self) -> int:
        return int(self._bounds[-1]) // self._seq_len

    def rows(self, numbers: np.ndarray) -> Batch:
        """The rows `numbers` ([B], from 0) as a batch. Raises IndexError if there is no such row."""
        if np.any((numbers < 0) | (numbers >= len(self))):
            raise IndexError(f"rows {numbers} of {len(self)}")
        first = numbers[:, None] * self._seq_len
        places = first + np.arange(self._seq_len)
        pieces = np.searchsorted(self._bounds, places, side="right") - 1
        begins = self._bounds[pieces]
        within = places - begins
        sources = within + self._sources[pieces]
        targets = self._tokens[sources + 1].astype(np.int32)
        learned = within >= self._contexts[pieces]
        if self._unlearned is not None:
            learned &= targets != self._unlearned
        return Batch(
            tokens=self._tokens[sources].astype(np.int32),
            targets=targets,
            positions=(places - np.maximum(begins, first)).astype(np.int32),
            segment_ids=(pieces - pieces[:, :1]).astype(np.int32),
            weights=learned.astype(np.float32),
        )
