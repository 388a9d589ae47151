"""Scores of generated answers on retrieval tasks, as published by RULER and by OpenAI's MRCR.

The prompts are the rows that are scored on logits, up to the answer.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from difflib import SequenceMatcher
from itertools import islice

import numpy as np

from ringattn.config import RETRIEVAL, Evaluation
from ringattn.data import ChatTemplate, Question, Tokenizer, question
from ringattn.data.tasks import PREFIX
from ringattn.evaluation.results import Result
from ringattn.evaluation.retrieval import interval, sample_seeds

GenerateFn = Callable[[list[np.ndarray], int, Sequence[str]], list[str]]
"""Returns a model's greedy answers to prompts of token ids, given the maximum number of tokens and stop strings."""
RULER_TOKENS = {"variables": 30, "common_words": 120, "frequent_words": 50}
"""Maximum number of tokens of an answer: tokens_to_generate of RULER, which has 128 for all tasks with needles."""
OTHER_TOKENS = {"where_person": 32, "where_thing": 32, "mrcr": 64}
"""The same for tasks that are not RULER's. It has 32 for questions about documents."""
TOKENS = dict.fromkeys(RETRIEVAL, 128) | RULER_TOKENS | OTHER_TOKENS
BYTES_PER_TOKEN = 4
"""Number of tokens that a tokenizer of bytes needs for the text of one token of a vocabulary of words."""
NEXT_TURN = "\nUser:"
"""Ends an answer to mrcr: a model without chat template continues the conversation."""


def measure(
    generate: GenerateFn,
    tokenizer: Tokenizer,
    c: Evaluation,
    task: str,
    length: int,
    depth: float,
    chat: ChatTemplate | None = None,
) -> Result:
    """The result of a cell: answers to `samples` prompts, the rows of `retrieval.measure` without their answers.

    `rate` is the mean score, from 0 to 1, with the 95 % interval `low` to `high`; RULER publishes it times 100. `right`
    is the number of samples with score 1. `generated` lists the questions, references, answers and scores.
    """
    stop = (NEXT_TURN,) if task == "mrcr" else ()
    rows = []
    for questions in _batches(tokenizer, c, task, length, depth, chat):
        prompts = [sample.tokens[: sample.answer_bounds[0]].astype(np.int32) for sample in questions]
        # A batch of another size would compile other programs.
        prompts += prompts[:1] * (c.batch_size - len(prompts))
        answers = generate(prompts, answer_tokens(task, tokenizer), stop)
        rows += [_scored(task, sample, answer) for sample, answer in zip(questions, answers, strict=False)]
    scores = [row["score"] for row in rows]
    low, high = interval(float(np.mean(scores)), c.samples)
    return {
        "samples": c.samples,
        "right": sum(score == 1 for score in scores),
        "rate": float(np.mean(scores)),
        "low": low,
        "high": high,
        "generated": rows,
    }


def answer_tokens(task: str, tokenizer: Tokenizer) -> int:
    """Returns the maximum number of tokens of an answer."""
    return TOKENS[task] * (BYTES_PER_TOKEN if tokenizer.name == "bytes" else 1)


def string_match_all(answer: str, references: Sequence[str]) -> float:
    """Returns the fraction of references that the answer contains, whatever their case.

    The metric of RULER's tasks other than question answering (github.com/NVIDIA/RULER, scripts/eval/synthetic).
    """
    return sum(reference.lower() in answer.lower() for reference in references) / len(references)


def prefixed_ratio(answer: str, reference: str) -> float:
    """Returns the similarity, from 0 to 1, of an answer and a reference that begins with PREFIX random characters.

    0 unless the answer begins with these characters. Otherwise difflib's ratio of what follows them, as published with
    MRCR (huggingface.co/datasets/openai/mrcr).
    """
    prefix = reference[:PREFIX]
    if not answer.startswith(prefix):
        return 0.0
    return SequenceMatcher(None, answer.removeprefix(prefix), reference.removeprefix(prefix)).ratio()


def _batches(
    tokenizer: Tokenizer, c: Evaluation, task: str, length: int, depth: float, chat: ChatTemplate | None
) -> Iterator[list[Question]]:
    questions = (question(task, tokenizer, length, depth, seed, chat) for seed in sample_seeds(c))
    while group := list(islice(questions, c.batch_size)):
        yield group


def _scored(task: str, sample: Question, generated: str) -> Result:
    """Returns a sample with its answer and score. Control characters become newlines, as in RULER's evaluation."""
    references = [answer.strip(" ,<>") for answer in sample.passage.answers]
    answer = re.sub(r"[\x00-\x1f]", "\n", generated.strip()).strip()
    score = prefixed_ratio(answer, references[0]) if task == "mrcr" else string_match_all(answer, references)
    asked = sample.passage.question.strip()
    return {"question": asked, "references": references, "answer": answer, "score": score}
