"""Is the answer to a question about a long text what the model would have said? No sampling: the answer is given."""

from collections import deque
from collections.abc import Iterator
from itertools import pairwise
from math import sqrt
from typing import Any

import numpy as np

from ringattn.config import Evaluation
from ringattn.data import Batch, Question, Tokenizer, question
from ringattn.evaluation.scoring import Score, in_batches, single


def measure(score: Score, tokenizer: Tokenizer, c: Evaluation, task: str, length: int, depth: float) -> dict[str, Any]:
    """What a cell comes to: `samples` rows of `length` tokens.

    `right` counts the rows all of whose answer tokens are the likeliest ones (exact match), `rate` is their share, from
    `low` to `high` its 95 % interval; `answers` is the share of single answers that are right; `nats` the mean over the
    rows of -log p(answer), and `nats_error` its standard error.
    """
    asked: deque[Question] = deque()

    def rows() -> Iterator[Batch]:
        for seed in seeds(c):
            row = question(task, tokenizer, length, depth, seed)
            asked.append(row)
            yield single(row.tokens, np.append(row.tokens[1:], tokenizer.boundary))

    right, answers, nats = 0, [], []
    for batch, scores in in_batches(score, rows(), c.batch_size):
        for own, best, target in zip(scores.nats, scores.best, batch.targets, strict=True):
            ends = asked.popleft().ends
            # The token at a place is the target of the one before.
            spans = [slice(begin - 1, end - 1) for begin, end in pairwise(ends)]
            found = [bool(np.all(best[span] == target[span])) for span in spans]
            right += all(found)
            answers.append(sum(found) / len(found))
            nats.append(float(own[ends[0] - 1 : ends[-1] - 1].sum(dtype=np.float64)))
    low, high = wilson(right, c.samples)
    return {
        "samples": c.samples,
        "right": right,
        "rate": right / c.samples,
        "low": low,
        "high": high,
        "answers": float(np.mean(answers)),
        "nats": float(np.mean(nats)),
        "nats_error": float(np.std(nats, ddof=1) / sqrt(c.samples)) if c.samples > 1 else None,
    }


def seeds(c: Evaluation) -> list[str]:
    """Of the rows of a cell: at each depth they ask the same."""
    return [f"{c.seed} {number}" for number in range(c.samples)]


def wilson(right: int, count: int) -> tuple[float, float]:
    """The 95 % interval of a rate of which `right` of `count` were seen (Wilson 1927, doi:10.2307/2276774)."""
    z = 1.959964
    rate, spread = right / count, z * z / count
    middle = (rate + spread / 2) / (1 + spread)
    half = z / (1 + spread) * sqrt(rate * (1 - rate) / count + spread / (4 * count))
    return middle - half if right else 0.0, middle + half if right < count else 1.0
