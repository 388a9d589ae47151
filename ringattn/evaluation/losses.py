"""Losses on text: by position in the row, by context length for the same tokens, by kind of document."""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TypedDict

import numpy as np
from jaxtyping import Integer

from ringattn.config import Evaluation
from ringattn.data import Batch, Corpus, PackedRows
from ringattn.evaluation.batches import ScoreFn, as_batch, score_in_batches
from ringattn.evaluation.results import Result
from ringattn.model.scoring import Scores

MAX_RANGES = 48
"""Largest number of position ranges. Their lengths grow, so that they are evenly spaced on a logarithmic axis."""


class Mean(TypedDict):
    """A mean loss in nats per token."""

    loss: float
    error: float | None
    """Standard error; None for a single document."""


@dataclass(frozen=True)
class Text:
    """Documents to compute losses on."""

    corpora: list[Corpus]
    kinds: list[list[str]]
    """The kind of each document, per corpus."""

    @cached_property
    def fingerprint(self) -> str:
        """Hexadecimal digest of all tokens and kinds."""
        parts = [corpus.fingerprint for corpus in self.corpora] + [repr(self.kinds)]
        return hashlib.sha256("/".join(parts).encode()).hexdigest()

    def windows(self, length: int, count: int, seed: int) -> list[tuple[Corpus, int, int]]:
        """Up to `count` windows of `length` tokens, each within one document: (corpus, document, first token).

        Windows do not overlap. `seed` selects the windows. Raises ValueError if every document is shorter.
        """
        windows = [
            (corpus, int(document), begin)
            for corpus in self.corpora
            for document in np.flatnonzero(corpus.lengths >= length)
            for begin in range(0, corpus.lengths[document] + 1 - length, length)
        ]
        if not windows:
            longest = max(int(corpus.lengths.max()) for corpus in self.corpora)
            fix = f"use --lengths of at most {longest}, or other text with --path"
            raise ValueError(f"lengths: the text has no document of {length} tokens, the longest has {longest}; {fix}")
        return [windows[number] for number in _draw(len(windows), count, seed)]


def by_position(score: ScoreFn, c: Evaluation, text: Text, length: int) -> Result:
    """Loss of rows of one document each, in total and per range of positions.

    If the model uses its context, the loss falls with the position.
    """
    windows = text.windows(length, c.samples, c.seed)
    total, nats, weights, documents = Total(), [], [], _document_numbers(windows)
    rows = (total.count(*_row(*window, length)) for window in windows)
    for batch, scores in score_in_batches(score, rows, c.batch_size):
        total.add(batch, scores)
        nats.append(batch.weights * scores.nats)
        weights.append(batch.weights)
    nats, weights = np.concatenate(nats), np.concatenate(weights)
    ranges = []
    for first, last in _ranges(length):
        sums, counts = (array[:, first : last + 1].sum(1, dtype=np.float64) for array in (nats, weights))
        if counts.any():
            ranges.append({"first": first, "last": last} | _mean_and_error(sums, counts, documents))
    return total.means() | {"rows": len(windows), "documents": len(set(documents)), "by_position": ranges}


def by_context(score: ScoreFn, c: Evaluation, text: Text, length: int) -> Result:
    """Loss of the same tokens at every length.

    Rows of all lengths end at the same token. The last tokens are scored, so that only their context differs.
    """
    longest, scored = max(c.lengths), min(c.lengths) // 2
    windows = text.windows(longest, c.samples, c.seed)

    def rows() -> Iterator[Batch]:
        for corpus, document, begin in windows:
            row, text_bytes = _row(corpus, document, begin + longest - length, length)
            row.weights[:, :-scored] = 0
            yield total.count(row, text_bytes)

    total, sums, counts = Total(), [], []
    for batch, scores in score_in_batches(score, rows(), c.batch_size):
        total.add(batch, scores)
        sums.append((batch.weights * scores.nats).sum(1, dtype=np.float64))
        counts.append(batch.weights.sum(1, dtype=np.float64))
    documents = _document_numbers(windows)
    return total.means() | {
        "rows": len(windows),
        "documents": len(set(documents)),
        "scored": scored,
        "row_nats": np.concatenate(sums).tolist(),
        "row_tokens": np.concatenate(counts).tolist(),
        "row_documents": documents,
    }


def changes(results: list[Result]) -> list[Mean]:
    """Returns, for each result of `by_context`, the loss minus the loss of the shortest rows, with standard error.

    The differences are paired: all rows score the same tokens, so the change is more precise than either loss.
    """
    shortest = np.array(min(results, key=lambda result: result["length"])["row_nats"])
    return [
        _mean_and_error(
            np.array(result["row_nats"]) - shortest, np.array(result["row_tokens"]), result["row_documents"]
        )
        for result in results
    ]


def by_kind(score: ScoreFn, c: Evaluation, text: Text, length: int) -> Result:
    """Loss of packed rows, separately per kind of document. Also lists the kinds that do not fill one row."""
    totals: dict[str, Total] = {}
    for corpus, kinds in zip(text.corpora, text.kinds, strict=True):
        for kind in sorted(set(kinds)):
            chosen = corpus.take(np.array([other == kind for other in kinds]))
            packed = PackedRows(chosen, length, np.arange(chosen.starts.size))
            total = totals.setdefault(kind, Total())
            numbers = (np.array([number]) for number in _draw(len(packed), c.samples, c.seed))
            rows = (total.count(packed.rows(number), packed.text_bytes(number)) for number in numbers)
            for batch, scores in score_in_batches(score, rows, c.batch_size):
                total.add(batch, scores)
    return {
        "kinds": [{"kind": kind} | total.means() for kind, total in totals.items() if total.weight],
        "too_short": [kind for kind, total in totals.items() if not total.weight],
    }


class Total:
    """Loss, accuracy and bits per byte of all tokens added so far."""

    def __init__(self):
        self._nats = self._correct = self.weight = 0.0
        self._bytes = 0

    def count(self, batch: Batch, text_bytes: Integer[np.ndarray, "B L"]) -> Batch:
        """Adds the text bytes of the targets with nonzero weight. Returns the unscored batch."""
        self._bytes += int(np.sum(text_bytes, where=batch.weights > 0))
        return batch

    def add(self, batch: Batch, scores: Scores) -> None:
        weights, correct = batch.weights, scores.predictions == batch.targets
        self._nats += float(np.sum(weights * scores.nats, dtype=np.float64))
        self._correct += float(np.sum(weights, where=correct, dtype=np.float64))
        self.weight += float(np.sum(weights, dtype=np.float64))

    def means(self) -> Result:
        """Raises ValueError if no token has weight."""
        if not self.weight:
            raise ValueError("the text consists of prompts alone, so no token is scored; use other text with --path")
        bits = self._nats / math.log(2) / self._bytes if self._bytes else None
        means = {"loss": self._nats / self.weight, "accuracy": self._correct / self.weight}
        return means | {"bits_per_byte": bits, "tokens": int(self.weight)}


def _ranges(length: int) -> list[tuple[int, int]]:
    """First and last position of each range."""
    starts = sorted({0, *np.geomspace(1, length, MAX_RANGES, endpoint=False).round().astype(int).tolist()})
    return list(zip(starts, [*(start - 1 for start in starts[1:]), length - 1], strict=True))


def _document_numbers(windows: list[tuple[Corpus, int, int]]) -> list[int]:
    """The number of each window's document, from 0 in order of first occurrence."""
    keys = [(id(corpus), document) for corpus, document, _ in windows]
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    return [numbers[key] for key in keys]


def _mean_and_error(sums: np.ndarray, counts: np.ndarray, documents: list[int]) -> Mean:
    """Returns the mean over tokens and its standard error, from the sum of losses and number of tokens per row.

    Rows of one document are correlated, so the error treats documents as the independent samples (the sandwich
    estimator for clusters).
    """
    mean = sums.sum() / counts.sum()
    residuals = np.bincount(documents, sums - mean * counts)
    if residuals.size == 1:
        return {"loss": float(mean), "error": None}
    scale = residuals.size / (residuals.size - 1)
    return {"loss": float(mean), "error": float(math.sqrt(scale * np.square(residuals).sum()) / counts.sum())}


def _draw(available: int, count: int, seed: int) -> list[int]:
    """Returns up to `count` different numbers below `available`, in a random order that depends on `seed`."""
    keys = np.atleast_1d(np.random.PCG64(seed).random_raw(available)) if available else np.zeros(0)
    return np.argsort(keys, kind="stable")[:count].tolist()


def _row(corpus: Corpus, document: int, begin: int, length: int) -> tuple[Batch, np.ndarray]:
    """The tokens `begin` to `begin + length - 1` of a document as a batch [1, length], and the bytes of its targets."""
    positions = begin + np.arange(length)
    indices = corpus.starts[document] + positions
    batch = as_batch(corpus.inputs(indices), corpus.tokens[indices + 1])
    weighted = (positions >= corpus.masked_prefixes[document])[None]
    if corpus.ignored_id is not None:
        weighted = weighted & (batch.targets != corpus.ignored_id)
    return batch._replace(weights=weighted.astype(np.float32)), corpus.count_bytes(indices + 1)[None]
