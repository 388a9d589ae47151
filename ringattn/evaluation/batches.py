"""Scores rows in batches of one size."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice

import numpy as np
from jaxtyping import Integer

from ringattn.data import Batch
from ringattn.data.packing import concatenate
from ringattn.model.scoring import Scores

ScoreFn = Callable[[Iterable[Batch]], Iterator[Scores]]
"""Yields a model's scores of each batch [B, L]."""


def as_batch(tokens: Integer[np.ndarray, " L"], targets: Integer[np.ndarray, " L"]) -> Batch:
    """A batch [1, L] of one row that is one sequence; every target has weight 1."""
    positions, weights = np.arange(tokens.size, dtype=np.int32), np.ones(tokens.size, np.float32)
    return Batch(tokens[None].astype(np.int32), targets[None].astype(np.int32), positions[None], None, weights[None])


def score_in_batches(score: ScoreFn, rows: Iterable[Batch], size: int) -> Iterator[tuple[Batch, Scores]]:
    """Groups `rows` [1, L] into batches of `size` and yields each with its scores; the last batch may be smaller.

    Before scoring, the last batch is padded to `size` with copies of its first row, so that the model compiles for one
    shape; the scores of the copies are dropped. `rows` is consumed lazily.
    """
    remaining, unpadded = iter(rows), deque[Batch]()

    def padded() -> Iterator[Batch]:
        while group := list(islice(remaining, size)):
            unpadded.append(concatenate(group))
            yield concatenate(group + [group[0]] * (size - len(group)))

    for scores in score(padded()):
        batch = unpadded.popleft()
        yield batch, Scores(*(array[: len(batch.tokens)] for array in scores))
