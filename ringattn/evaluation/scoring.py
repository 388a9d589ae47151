"""Rows, one after another, scored in batches of one size."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice

import numpy as np

from ringattn.data import Batch
from ringattn.training.score import Scores

Score = Callable[[Iterable[Batch]], Iterator[Scores]]
"""A model's scores of batches [B, L], one after another."""


def single(tokens: np.ndarray, targets: np.ndarray) -> Batch:
    """A row that is one document, [1, L] from [L]."""
    positions, ones = np.arange(tokens.size, dtype=np.int32), np.ones(tokens.size, np.float32)
    row = tokens.astype(np.int32), targets.astype(np.int32), positions, np.zeros_like(positions), ones
    return Batch(*(each[None] for each in row))


def in_batches(score: Score, rows: Iterable[Batch], size: int) -> Iterator[tuple[Batch, Scores]]:
    """The `rows` [1, L] in batches of `size`, with their scores; the last batch may be smaller.

    It is filled up for the devices with rows that are scored in vain. Rows are asked for when their turn comes.
    """
    taken, waiting = iter(rows), deque[Batch]()

    def filled() -> Iterator[Batch]:
        while some := list(islice(taken, size)):
            waiting.append(Batch(*map(np.concatenate, zip(*some, strict=True))))
            yield Batch(*map(np.concatenate, zip(*some, *[some[0]] * (size - len(some)), strict=True)))

    for scores in score(filled()):
        batch = waiting.popleft()
        yield batch, Scores(*(each[: len(batch.tokens)] for each in scores))
