"""Answers are generated from the rows that are scored on logits, and scored by the published metrics."""

import json
import re
from dataclasses import replace
from difflib import SequenceMatcher
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from random_runs import make_run
from test_evaluation import output_of, results_of

from ringattn import config, weights
from ringattn.config import RETRIEVAL
from ringattn.data import load_tokenizer, question
from ringattn.evaluation import cells, evaluate, generated
from ringattn.evaluation.generated import answer_tokens, measure, prefixed_ratio, string_match_all
from ringattn.evaluation.retrieval import interval

TOKENIZER = load_tokenizer("bytes")
LENGTH = 256
ANSWER_TOKENS = 8


def test_the_metric_of_ruler():
    """The examples follow scripts/eval/synthetic/constants.py of NVIDIA/RULER."""
    assert string_match_all("It is 1234567.", ["1234567"]) == 1
    assert string_match_all("12345, 1234567", ["1234567", "7654321"]) == 0.5
    assert string_match_all("abc def", ["ABC", "Def", "ghi", "jkl"]) == 0.5
    assert string_match_all("", ["a"]) == 0


def test_the_metric_of_mrcr():
    """The example is that of the dataset's card."""
    reference = "aYooSG8CQgTapirs walk by night"
    assert prefixed_ratio(reference, reference) == 1
    assert prefixed_ratio("aYooSG8CQg", "aYooSG8CQg") == 1
    assert prefixed_ratio(reference[1:], reference) == 0
    assert prefixed_ratio(f"Here it is: {reference}", reference) == 0
    partly = prefixed_ratio("aYooSG8CQgTapirs sleep by day", reference)
    assert partly == SequenceMatcher(None, "Tapirs sleep by day", "Tapirs walk by night").ratio()
    assert 0.5 < partly < 1


def test_the_numbers_of_tokens_are_those_of_ruler():
    """Values of tokens_to_generate in scripts/data/synthetic/constants.py."""
    published = {"needle": 128, "multi_value": 128, "variables": 30, "common_words": 120, "frequent_words": 50}
    assert {task: generated.TOKENS[task] for task in published} == published
    assert generated.TOKENS.keys() == set(RETRIEVAL)
    assert answer_tokens("variables", TOKENIZER) == 120  # bytes
    longest = max(len("".join(question(task, TOKENIZER, 2000, 0.3, "0").passage.answers)) for task in RETRIEVAL)
    assert longest < min(answer_tokens(task, TOKENIZER) for task in ("mrcr", "common_words", "variables"))


def answered(task, change=lambda answer: answer, samples=5, batch_size=2, length=LENGTH):
    """Returns the result for a model that knows all answers, after `change(answer)`, and the calls of the model."""
    calls, answers = [], {}
    for number in range(samples):
        row = question(task, TOKENIZER, length, 0.3, f"0 {number}")
        prompt, answer = row.tokens[: row.answer_bounds[0]], row.tokens[row.answer_bounds[0] :]
        answers[prompt.tobytes()] = TOKENIZER.decode(answer)

    def generate(prompts, max_tokens, stop):
        calls.append((len(prompts), max_tokens, stop))
        return [change(answers[prompt.astype(np.uint16).tobytes()]) for prompt in prompts]

    c = config.Evaluation(scoring="generation", tasks=(task,), samples=samples, batch_size=batch_size)
    return measure(generate, TOKENIZER, c, task, length, 0.3), calls


@pytest.mark.parametrize("task", RETRIEVAL)
def test_the_correct_answer_has_score_one(task):
    result, calls = answered(
        task, lambda answer: f"{answer}.\x02\n and more" if task != "mrcr" else answer, length=1500
    )
    assert (result["right"], result["rate"], result["high"]) == (5, 1.0, 1.0)
    assert {count for count, _, _ in calls} == {2}  # the last batch is padded
    assert len(calls) == 3
    assert {tokens for _, tokens, _ in calls} == {answer_tokens(task, TOKENIZER)}
    assert {stop for _, _, stop in calls} == {("\nUser:",) if task == "mrcr" else ()}
    for row in result["generated"]:
        assert row["score"] == 1
        assert "\x02" not in row["answer"]
        assert all(reference in row["answer"] for reference in row["references"])
    assert answered(task, lambda answer: "none", length=1500)[0]["rate"] == 0


def test_a_part_of_the_answers_counts_in_part():
    """Two of the four values."""
    result, _ = answered("multi_value", lambda answer: ",".join(answer.split(",")[:2]), length=400)
    assert (result["right"], result["rate"]) == (0, 0.5)
    assert (result["low"], result["high"]) == interval(0.5, 5)
    assert result["low"] < 0.5 < result["high"]
    row = result["generated"][0]
    assert row["question"].startswith("The magic numbers of")
    assert len(row["references"]) == 4
    assert all(reference.isdecimal() for reference in row["references"])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Config of an evaluation of a random model, whose answers have 8 tokens."""
    text = np.random.default_rng(0).integers(97, 107, 4000, dtype=np.uint8).tobytes()
    run = make_run(tmp_path_factory.mktemp("generated") / "run", text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generated, "TOKENS", dict.fromkeys(RETRIEVAL, ANSWER_TOKENS // 4))
        yield config.Evaluation(
            name="generated",
            runs=(str(run),),
            tasks=("needle", "where_person"),
            scoring="generation",
            lengths=(LENGTH,),
            depths=(0.5,),
            samples=3,
            batch_size=2,
            mesh=config.Mesh(context=4, data=2),
        )


def greedy(path, prompts, tokens):
    """Continuations of prompts by the forward pass over whole rows."""
    loaded, found = weights.load(path, config.Mesh(context=8)), []
    for prompt in prompts:
        row = list(prompt)
        while len(row) < len(prompt) + tokens and row[-1] != TOKENIZER.boundary:
            padded = np.pad(np.array(row, np.int32), (0, LENGTH + ANSWER_TOKENS - len(row)))
            row.append(int(np.argmax(loaded.logits(padded[None])[0, len(row) - 1, : TOKENIZER.size])))
        found.append(TOKENIZER.decode(row[len(prompt) :]))
    return found


@pytest.fixture(scope="module")
def evaluated(base):
    assert evaluate(base) == 0
    return base


def test_the_answers_are_greedy_and_are_kept(evaluated):
    needle, person = results_of(evaluated)
    assert (needle["task"], needle["depth"], person["depth"]) == ("needle", 0.5, None)
    assert "generated" not in needle
    rows = [json.loads(line) for line in (output_of(evaluated) / "answers.jsonl").read_text().splitlines()]
    assert [row["task"] for row in rows] == ["needle"] * 3 + ["where_person"] * 3
    prompts = []
    for number, row in enumerate(rows[:3]):
        sample = question("needle", TOKENIZER, LENGTH, 0.5, f"0 {number}")
        prompts.append(sample.tokens[: sample.answer_bounds[0]])
        references = [TOKENIZER.decode(sample.tokens[a:b]).strip() for a, b in pairwise(sample.answer_bounds)]
        assert row["references"] == references
    expected = greedy(evaluated.runs[0], prompts, ANSWER_TOKENS)
    assert [row["answer"] for row in rows[:3]] == [re.sub(r"[\x00-\x1f]", "\n", text).strip() for text in expected]
    assert any(expected)
    table = (output_of(evaluated) / "table.md").read_text()
    assert "## needle: score of generated answers by length and depth (95 % interval)" in table
    assert "| 256 | 0.000 (0.00 to 0.56) | 0 of 3 |" in table
    plots = {path.name for path in (output_of(evaluated) / "plots").iterdir()}
    assert plots == {"needle.png", "retrieval.png"}


def test_finished_cells_are_not_generated_again(evaluated, monkeypatch, capsys):
    answers = output_of(evaluated) / "answers.jsonl"
    before = answers.read_text()
    answers.unlink()
    monkeypatch.setattr(cells, "_measure", lambda *_: pytest.fail("the cell is finished"))
    assert evaluate(evaluated) == 0
    assert answers.read_text() == before
    line = "1/2  run: needle, 256 tokens, depth 50%: 0 of 3 answers correct, score 0.000 (stored)"
    assert line in capsys.readouterr().out


@pytest.mark.slow
def test_exact_match_after_generation(base):
    """Exact match is another result, and has no answers."""
    c = replace(base, name="again", tasks=("where_person",))
    assert evaluate(c) == 0
    assert (output_of(c) / "answers.jsonl").exists()
    assert evaluate(replace(c, scoring="logits")) == 0
    assert not (output_of(c) / "answers.jsonl").exists()
    assert "nats" in results_of(c)[0]


@pytest.mark.slow
def test_losses_and_generation_share_an_evaluation(base):
    """Also in bfloat16, where generation uses up the parameters that it is given."""
    path = Path(base.runs[0]) / "config.json"
    before = path.read_text()
    path.write_text(before.replace('"dtype": "float32"', '"dtype": "bfloat16"'))
    c = replace(base, name="both", tasks=("where_person", "loss_by_kind"), samples=1)
    assert evaluate(c) == 0
    path.write_text(before)
    assert [result["task"] for result in results_of(c)] == list(c.tasks)
    assert results_of(c)[1]["kinds"][0]["loss"] > 0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tasks": ("mrcr",)}, "tasks: mrcr is scored on generated answers; use --scoring generation"),
        ({"scoring": "generation"}, "scoring='generation' requires a retrieval task, such as needle"),
        ({"scoring": "sampling", "tasks": ("needle",)}, "scoring='sampling' must be"),
    ],
)
def test_a_config_checks_its_scoring(values, message):
    with pytest.raises(ValueError, match=message):
        config.Evaluation(**values)
