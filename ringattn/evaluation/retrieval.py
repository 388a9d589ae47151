"""Is the answer to a question about a long text what the model would have said? No sampling: the answer is given."""

from collections.abc import Iterator
from math import sqrt
from typing import Any

import numpy as np

from ringattn.config import Evaluation
from ringattn.data import Batch, Question, Tokenizer, question
from ringattn.evaluation.subject import Score


def measure(score: Score, tokenizer: Tokenizer, c: Evaluation, task: str, length: int, depth: float) -> dict[str, Any]:
    """What a cell comes to: `samples` rows of `length` tokens.

    `right` counts the rows all of whose answer tokens are the likeliest ones (exact match), `rate` is their share, from
    `low` to `high` its 95 % interval; `answers` is the share of single answers that are right; `nats` the mean over the
    rows of -log p(answer), and `nats_error` its standard error.
    """
    # Rows of one number ask the same at each depth.
    rows = [question(task, tokenizer, length, depth, f"{c.seed} {number}") for number in range(c.samples)]
    right, answers, nats = 0, [], []
    batches = list(_batches(rows, c.batch_size, tokenizer))
    for number, scores in enumerate(score(batches)):
        for place, row in enumerate(rows[number * c.batch_size : (number + 1) * c.batch_size]):
            # The token at a place is the target of the one before.
            spans = [slice(begin - 1, end - 1) for begin, end in zip(row.ends, row.ends[1:], strict=False)]
            found = [bool(np.all(scores.best[place, span] == row.tokens[1:][span])) for span in spans]
            right += all(found)
            answers.append(sum(found) / len(found))
            nats.append(float(sum(scores.nats[place, span].sum(dtype=np.float64) for span in spans)))
    low, high = wilson(right, len(rows))
    return {
        "samples": len(rows),
        "right": right,
        "rate": right / len(rows),
        "low": low,
        "high": high,
        "answers": float(np.mean(answers)),
        "nats": float(np.mean(nats)),
        "nats_error": float(np.std(nats) / sqrt(len(nats))),
    }


def _batches(rows: list[Question], size: int, tokenizer: Tokenizer) -> Iterator[Batch]:
    """The rows in batches of `size`; the last is filled up with rows that are scored in vain."""
    for begin in range(0, len(rows), size):
        tokens = np.stack([row.tokens for row in rows[begin : begin + size]]).astype(np.int32)
        tokens = np.concatenate([tokens, np.repeat(tokens[:1], size - len(tokens), axis=0)])
        end = np.full((size, 1), tokenizer.boundary, np.int32)
        yield single(tokens, np.concatenate([tokens[:, 1:], end], axis=1))


def single(tokens: np.ndarray, targets: np.ndarray) -> Batch:
    """Rows [B, L] that are one document each."""
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    return Batch(tokens, targets, positions, np.zeros_like(tokens), np.ones(tokens.shape, np.float32))


def wilson(right: int, count: int) -> tuple[float, float]:
    """The 95 % interval of a rate of which `right` of `count` were seen (Wilson 1927, doi:10.2307/2276774)."""
    z = 1.959964
    rate, spread = right / count, z * z / count
    middle = (rate + spread / 2) / (1 + spread)
    half = z / (1 + spread) * sqrt(rate * (1 - rate) / count + spread / (4 * count))
    return middle - half if right else 0.0, middle + half if right < count else 1.0
