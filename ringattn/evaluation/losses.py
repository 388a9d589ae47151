"""Losses on text: by position in a row, by how much context the same tokens have, by kind of document."""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import sqrt
from typing import Any

import numpy as np

from ringattn.config import Evaluation
from ringattn.data import Batch, Corpus, PackedRows, Tokenizer
from ringattn.evaluation.scoring import Score, in_batches, single
from ringattn.training.score import Scores

RANGES = 24
"""At most so many ranges of positions; they grow, so that a logarithmic axis shows them evenly."""


@dataclass(frozen=True)
class Text:
    """Documents to compute losses on."""

    corpora: list[Corpus]
    kinds: list[list[str]]
    """Of each document of each corpus."""

    @cached_property
    def fingerprint(self) -> str:
        parts = [corpus.fingerprint for corpus in self.corpora] + [repr(self.kinds)]
        return hashlib.sha256("/".join(parts).encode()).hexdigest()

    def windows(self, length: int, count: int, seed: int) -> list[tuple[Corpus, int, int]]:
        """Up to `count` stretches of `length` tokens, each of one document: (corpus, document, where it begins).

        None overlaps another; drawn by `seed`. Raises ValueError if no document is as long.
        """
        found = []
        for corpus in self.corpora:
            for document in np.flatnonzero(corpus.lengths >= length):
                found += [
                    (corpus, int(document), begin) for begin in range(0, corpus.lengths[document] + 1 - length, length)
                ]
        if not found:
            longest = max(int(corpus.lengths.max()) for corpus in self.corpora)
            cure = f"use --lengths of at most {longest}, or other text by --path"
            raise ValueError(f"lengths: the text has no document of {length} tokens, the longest has {longest}: {cure}")
        return [found[number] for number in _drawn(len(found), count, seed)]


def by_position(score: Score, tokenizer: Tokenizer, c: Evaluation, text: Text, length: int) -> dict[str, Any]:
    """Loss over rows that are one document each, and in ranges of positions: does it keep falling?"""
    windows = text.windows(length, c.samples, c.seed)
    total, nats, weights, groups = Total(tokenizer), [], [], _documents(windows)
    for batch, scores in in_batches(score, (_row(*each, length) for each in windows), c.batch_size):
        total.add(batch, scores)
        nats.append(batch.weights * scores.nats)
        weights.append(batch.weights)
    means, shares = total.means(), []
    for first, last in _ranges(length):
        sums, counts = (np.concatenate(each)[:, first : last + 1].sum(1, dtype=np.float64) for each in (nats, weights))
        if counts.any():
            shares.append({"first": first, "last": last} | _mean(sums, counts, groups))
    return means | {"rows": len(windows), "documents": len(set(groups)), "by_position": shares}


def by_context(score: Score, tokenizer: Tokenizer, c: Evaluation, text: Text, length: int) -> dict[str, Any]:
    """Loss of the same tokens, whatever the length: the last ones of rows that end where the longest rows end."""
    longest, scored = max(c.lengths), min(c.lengths) // 2
    windows = text.windows(longest, c.samples, c.seed)

    def rows() -> Iterator[Batch]:
        for corpus, document, begin in windows:
            row = _row(corpus, document, begin + longest - length, length)
            row.weights[:, :-scored] = 0
            yield row

    total, sums, counts = Total(tokenizer), [], []
    for batch, scores in in_batches(score, rows(), c.batch_size):
        total.add(batch, scores)
        sums.append((batch.weights * scores.nats).sum(1, dtype=np.float64))
        counts.append(batch.weights.sum(1, dtype=np.float64))
    groups = _documents(windows)
    rows_of = {"row_nats": np.concatenate(sums).tolist(), "row_tokens": np.concatenate(counts).tolist()}
    counted = {"rows": len(windows), "documents": len(set(groups)), "scored": scored}
    return total.means() | counted | rows_of | {"row_documents": groups}


def changes(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of by_context's results: each one's loss less that of the shortest rows, and the standard error over documents.

    The tokens are the same, so how hard they are cancels out, row by row: the change is known far better than the loss.
    """
    shortest = np.array(min(results, key=lambda each: each["length"])["row_nats"])
    return [
        _mean(np.array(each["row_nats"]) - shortest, np.array(each["row_tokens"]), each["row_documents"])
        for each in results
    ]


def by_kind(score: Score, tokenizer: Tokenizer, c: Evaluation, text: Text, length: int) -> dict[str, Any]:
    """Loss over packed rows of one kind of document after another; kinds of less than a row are named."""
    found: dict[str, Total] = {}
    for corpus, kinds in zip(text.corpora, text.kinds, strict=True):
        for kind in sorted(set(kinds)):
            chosen = corpus.take(np.array([each == kind for each in kinds]))
            packed = PackedRows(chosen, length, np.arange(chosen.starts.size))
            rows = (packed.rows(np.array([number])) for number in _drawn(len(packed), c.samples, c.seed))
            total = found.setdefault(kind, Total(tokenizer))
            for batch, scores in in_batches(score, rows, c.batch_size):
                total.add(batch, scores)
    return {
        "kinds": [{"kind": kind} | total.means() for kind, total in found.items() if total.weight],
        "too_short": [kind for kind, total in found.items() if not total.weight],
    }


class Total:
    """Loss, accuracy and bits per byte of all tokens that were added."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._nats = self._right = self.weight = 0.0
        self._bytes = 0

    def add(self, batch: Batch, scores: Scores) -> None:
        weights, right = batch.weights, scores.best == batch.targets
        self._nats += float(np.sum(weights * scores.nats, dtype=np.float64))
        self._right += float(np.sum(weights, where=right, dtype=np.float64))
        self.weight += float(np.sum(weights, dtype=np.float64))
        self._bytes += self._tokenizer.byte_length(batch.targets[weights > 0])

    def means(self) -> dict[str, Any]:
        """Raises ValueError if none of the tokens counts."""
        if not self.weight:
            raise ValueError("the text is all prompt, with nothing to learn: name other text by --path")
        bits = self._nats / math.log(2) / self._bytes if self._bytes else None
        means = {"loss": self._nats / self.weight, "accuracy": self._right / self.weight}
        return means | {"bits_per_byte": bits, "tokens": int(self.weight)}


def _ranges(length: int) -> list[tuple[int, int]]:
    starts = sorted({0, *np.geomspace(1, length, RANGES, endpoint=False).round().astype(int).tolist()})
    return list(zip(starts, [*(start - 1 for start in starts[1:]), length - 1], strict=True))


def _documents(windows: list[tuple[Corpus, int, int]]) -> list[int]:
    """A number for each window: the same for those of one document."""
    names = [(id(corpus), document) for corpus, document, _ in windows]
    number = {name: at for at, name in enumerate(dict.fromkeys(names))}
    return [number[name] for name in names]


def _mean(sums: np.ndarray, counts: np.ndarray, documents: list[int]) -> dict[str, Any]:
    """The mean over tokens of what each row has sums and counts of, and its standard error, None for one document.

    Rows of a document are alike, so that documents are what was drawn (the sandwich estimator for clusters).
    """
    mean = sums.sum() / counts.sum()
    apart = np.bincount(documents, sums - mean * counts)
    scale = apart.size / (apart.size - 1) if apart.size > 1 else None
    error = None if scale is None else float(sqrt(scale * np.square(apart).sum()) / counts.sum())
    return {"loss": float(mean), "error": error}


def _drawn(there: int, count: int, seed: int) -> list[int]:
    """Up to `count` of the numbers below `there`, drawn by `seed`."""
    keys = np.atleast_1d(np.random.PCG64(seed).random_raw(there)) if there else np.zeros(0)
    return np.argsort(keys, kind="stable")[:count].tolist()


def _row(corpus: Corpus, document: int, begin: int, length: int) -> Batch:
    """A stretch of a document as a row, [1, length]."""
    within = begin + np.arange(length)
    places = corpus.starts[document] + within
    row = single(corpus.tokens[places], corpus.tokens[places + 1])
    learned = (within >= corpus.contexts[document])[None]
    if corpus.unlearned is not None:
        learned = learned & (row.targets != corpus.unlearned)
    return row._replace(weights=learned.astype(np.float32))
