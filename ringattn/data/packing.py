"""Packing: documents are concatenated and cut into rows. A row does not depend on the preceding rows.

The stream of an epoch concatenates the pieces of the corpus in the order of that epoch. A whole document is `boundary
t1 ... tn`. Row i is the L tokens of the stream that start at i * L. The target of a token is the next token of its
document; the target of the last token is a boundary. A model reads its begin-of-text token in place of a boundary.
"""

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import jax
import numpy as np

from ringattn.data.corpus import Corpus

Arrays = TypeVar("Arrays")


class Batch(NamedTuple):
    """Rows of packed documents, each array [B, L].

    A segment is the part of a document that a row contains. Tokens attend only within their segment. Without segment
    ids, a row is one sequence.
    """

    tokens: np.ndarray
    """int32."""
    targets: np.ndarray
    """int32: the next token of the document."""
    positions: np.ndarray
    """int32: position within the segment, from 0; within the row, if there are no segment ids."""
    segment_ids: np.ndarray | None
    """int32: index of the segment within the row, from 0; None: each row is one sequence."""
    weights: np.ndarray
    """float32: loss weight of each target; 0 in masked prefixes and for ignored ids, otherwise 1."""


def concatenate(batches: Sequence[Arrays]) -> Arrays:
    """Concatenates arrays, or all arrays of batches, along dim 0. What is None in all batches stays None."""
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *batches)


class PackedRows:
    """Rows of `seq_len` tokens from the pieces of `corpus` in `order` ([pieces], a permutation).

    The last tokens of the stream, fewer than `seq_len`, are dropped, so that no row is padded. Unless
    `separate_documents`, positions count from the start of the row and there are no segment ids.
    """

    def __init__(self, corpus: Corpus, seq_len: int, order: np.ndarray, separate_documents: bool = True):
        self._corpus, self._ignored_id = corpus, corpus.ignored_id
        self._seq_len, self._separate_documents = seq_len, separate_documents
        self._starts, self._masked_prefixes = corpus.starts[order], corpus.masked_prefixes[order]
        # Offset of each piece in the stream, then the length of the stream.
        self._bounds = np.concatenate([np.zeros(1, np.int64), np.cumsum(corpus.lengths[order])])

    def __len__(self) -> int:
        return int(self._bounds[-1]) // self._seq_len

    def rows(self, indices: np.ndarray, needed: np.ndarray | None = None) -> Batch:
        """Returns the rows with `indices` ([B], from 0) as a batch. Raises IndexError for an index out of range.

        With `needed` ([B, L], boolean), reads only these tokens and targets; the others are 0. Reads all of them if
        the weights depend on targets.
        """
        if np.any((indices < 0) | (indices >= len(self))):
            raise IndexError(f"row indices {indices} are out of range for {len(self)} rows")
        offsets, pieces = self._locate(indices)
        piece_starts = self._bounds[pieces]
        within_piece = offsets - piece_starts
        token_indices = within_piece + self._starts[pieces]
        unmasked = within_piece >= self._masked_prefixes[pieces]
        if needed is None or self._ignored_id is not None:
            tokens, targets = self._read(token_indices)
        else:
            tokens, targets = np.zeros_like(token_indices, np.int32), np.zeros_like(token_indices, np.int32)
            tokens[needed], targets[needed] = self._read(token_indices[needed])
        if self._ignored_id is not None:
            unmasked &= targets != self._ignored_id
        return Batch(
            tokens=tokens,
            targets=targets,
            positions=(offsets - self._sequence_starts(indices, piece_starts)).astype(np.int32),
            segment_ids=(pieces - pieces[:, :1]).astype(np.int32) if self._separate_documents else None,
            weights=unmasked.astype(np.float32),
        )

    def _sequence_starts(self, indices: np.ndarray, piece_starts: np.ndarray) -> np.ndarray:
        """Returns the offset in the stream of the token with position 0, for each token of the rows."""
        row_starts = indices[:, None] * self._seq_len
        return np.maximum(piece_starts, row_starts) if self._separate_documents else row_starts

    def _read(self, token_indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns tokens and targets."""
        return self._corpus.inputs(token_indices), self._corpus.tokens[token_indices + 1].astype(np.int32)

    def text_bytes(self, indices: np.ndarray) -> np.ndarray:
        """Returns the number of bytes of text of each target of `rows(indices)`: [B, L] int32."""
        offsets, pieces = self._locate(indices)
        return self._corpus.count_bytes(offsets - self._bounds[pieces] + self._starts[pieces] + 1)

    def _locate(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the offset of each token of the rows in the stream, and the index of its piece: [B, L] each."""
        offsets = indices[:, None] * self._seq_len + np.arange(self._seq_len)
        return offsets, np.searchsorted(self._bounds, offsets, side="right") - 1
