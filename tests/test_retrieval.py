"""Retrieval tasks are scored by exact match, with an oracle in place of a model."""

import numpy as np
import pytest

from ringattn import config
from ringattn.data import Question, load_tokenizer, question
from ringattn.data.tasks import Passage
from ringattn.data.text_bytes import NO_CORRECTIONS
from ringattn.evaluation import retrieval
from ringattn.model.scoring import Scores

LENGTH, SAMPLES = 384, 3
TOKENIZER = load_tokenizer("bytes")


def measure(change, task="multi_value"):
    """The result for a model that predicts every target at no loss, after `change(predictions, nats)` per batch."""

    def oracle(batches):
        for batch in batches:
            predictions, nats = batch.targets.copy(), np.zeros(batch.targets.shape, np.float32)
            change(predictions, nats)
            yield Scores(nats, predictions)

    c = config.Evaluation(samples=SAMPLES, batch_size=2)
    return retrieval.measure(oracle, TOKENIZER, c, task, LENGTH, 0.0)


def test_exact_match_needs_every_token_of_the_answer():
    sample = question("multi_value", TOKENIZER, LENGTH, 0.0, "0 0")
    # The indices whose targets are the first and last answer tokens.
    first, last = sample.answer_bounds[0] - 1, sample.answer_bounds[-1] - 2
    assert measure(lambda predictions, nats: None)["right"] == SAMPLES

    def wrong_at(index):
        def change(predictions, nats):
            predictions[0, index] += 1
            nats[0, index] += 6.0

        return change

    for index, wrong in ((first - 1, 0), (first, 1), (last, 1), (last + 1, 0)):
        result = measure(wrong_at(index))
        # Two batches of two rows, wrong in the first row of each. The last row is padding, which does not count.
        assert result["right"] == SAMPLES - 2 * wrong
        assert result["rate"] == result["right"] / SAMPLES
        assert result["answers"] == pytest.approx(1 - 2 * wrong * 0.25 / SAMPLES)
        assert result["nats"] == pytest.approx(2 * wrong * 6.0 / SAMPLES)


@pytest.mark.parametrize(
    ("right", "count", "low", "high"), [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (50, 100, 0.4038, 0.5962)]
)
def test_wilson_interval(right, count, low, high, monkeypatch):
    """Values of Wilson 1927 (doi:10.2307/2276774)."""
    sample = Question(np.arange(4, dtype=np.int32), (2, 4), NO_CORRECTIONS, Passage("", "", ("",)))
    monkeypatch.setattr(retrieval, "question", lambda *_: sample)
    remaining = iter([True] * right + [False] * (count - right))

    def oracle(batches):
        for batch in batches:
            yield Scores(np.zeros(batch.targets.shape, np.float32), batch.targets + (not next(remaining)))

    c = config.Evaluation(samples=count, batch_size=1)
    result = retrieval.measure(oracle, TOKENIZER, c, "needle", 4, 0.0)
    assert (result["right"], result["rate"]) == (right, right / count)
    # The ends are exact where every sample, or none, is right.
    assert result["low"] == (0.0 if right == 0 else pytest.approx(low, abs=1e-4))
    assert result["high"] == (1.0 if right == count else pytest.approx(high, abs=1e-4))
