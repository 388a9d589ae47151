"""Exact match on retrieval tasks: every token of the answer is the most likely one, given the tokens before it.

The model reads question and answer in one forward pass (teacher forcing); nothing is sampled.
"""

from collections import deque
from collections.abc import Iterator
from itertools import pairwise
from math import sqrt

import numpy as np
from scipy.stats import norm

from ringattn.config import Evaluation
from ringattn.data import Batch, ChatTemplate, Question, Tokenizer, question
from ringattn.evaluation.batches import ScoreFn, as_batch, score_in_batches
from ringattn.evaluation.results import Result


def measure(
    score: ScoreFn,
    tokenizer: Tokenizer,
    c: Evaluation,
    task: str,
    length: int,
    depth: float,
    chat: ChatTemplate | None = None,
) -> Result:
    """The result of a cell: `samples` rows of `length` tokens, in a chat template unless it is None.

    A sample may ask for several answers. `right` is the number of samples with an exact match: all tokens of all
    answers are the most likely ones. `rate` is right / samples, with the 95 % interval `low` to `high`.
    `answers` is the fraction of individual answers that match. `nats` is the mean over samples of -log p(all answers),
    and `nats_error` its standard error.
    """
    questions: deque[Question] = deque()

    def rows() -> Iterator[Batch]:
        for seed in sample_seeds(c):
            sample = question(task, tokenizer, length, depth, seed, chat)
            questions.append(sample)
            yield as_batch(sample.tokens, np.append(sample.tokens[1:], tokenizer.boundary))

    right, answers, nats = 0, [], []
    for batch, scores in score_in_batches(score, rows(), c.batch_size):
        for losses, predictions, targets in zip(scores.nats, scores.predictions, batch.targets, strict=True):
            bounds = questions.popleft().answer_bounds
            # Index i predicts token i + 1, so the targets of tokens[begin:end] are at begin - 1 to end - 2.
            spans = [slice(begin - 1, end - 1) for begin, end in pairwise(bounds)]
            matches = [bool(np.all(predictions[span] == targets[span])) for span in spans]
            right += all(matches)
            answers.append(sum(matches) / len(matches))
            nats.append(float(losses[bounds[0] - 1 : bounds[-1] - 1].sum(dtype=np.float64)))
    low, high = interval(right / c.samples, c.samples)
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


def interval(rate: float, samples: int) -> tuple[float, float]:
    """Returns Wilson's 95 % interval of a mean of `samples` scores of 0 or 1.

    For scores between 0 and 1 it is wider than necessary: their variance is smaller than that of 0 or 1.
    """
    z = float(norm.ppf(0.975))
    scale, spread = 1 + z**2 / samples, z * sqrt(rate * (1 - rate) / samples + (z / (2 * samples)) ** 2)
    centre = rate + z**2 / (2 * samples)
    # Rounding must not move the ends away from 0 and 1.
    low, high = (centre - spread) / scale, (centre + spread) / scale
    return (0.0 if rate == 0 else low), (1.0 if rate == 1 else high)


def sample_seeds(c: Evaluation) -> list[str]:
    """Seeds of a cell's samples, the same for every depth, so that all depths ask the same questions."""
    return [f"{c.seed} {number}" for number in range(c.samples)]
