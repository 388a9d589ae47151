"""lm-eval scores a model of ours as our own evaluation does, on tasks of local files."""

import json
import math
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from random_runs import make_run
from test_evaluation import results_of

from ringattn import config
from ringattn.evaluation import evaluate
from ringattn.generation import Generator

pytest.importorskip("lm_eval", reason="pip install 'ringattn[lm-eval]'")
# Packages that lm-eval imports warn about themselves.
pytestmark = pytest.mark.filterwarnings("ignore")

LENGTH = 24
"""Maximum number of tokens that the model reads."""
TEXT = b"bad cab, a big bee and a dead bed made a decade of fame: add a jade bead, a cafe, a bag"


def request(*args: Any) -> SimpleNamespace:
    """A request of lm-eval."""
    return SimpleNamespace(args=args)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("lm_eval") / "run", TEXT * 20, scale=5.0)


@pytest.fixture(scope="module")
def generator(run):
    return Generator.load(run, config.Mesh(context=8), cache_tokens=LENGTH + 1, cache_dtype="float32", chunk=32)


@pytest.fixture(scope="module")
def model(generator):
    from ringattn.generation.lm_eval import RingModel

    return RingModel(generator, batch_size=2)


def ids(text: str) -> list[int]:
    return list(text.encode())


def test_a_log_likelihood_is_that_of_the_generator(model, generator):
    pairs = [("a dead", " bed"), ("a big ", "bee"), ("", "cab"), ("abcdefghij" * 5, " far")]
    found = model.loglikelihood([request(*pair) for pair in pairs])
    start = generator.served.texts.start[0]
    kept = LENGTH + 1 - len(" far")
    # The space belongs to the continuation, and the text without context has the start as its context.
    rows = [([start, *ids("a dead")], ids(" bed")), ([start, *ids("a big")], ids(" bee")), ([start], ids("cab"))]
    rows.append((ids("abcdefghij" * 5)[-kept:], ids(" far")))
    for (nats, greedy), (expected, likely) in zip(found, generator.scores(rows), strict=True):
        assert nats == pytest.approx(float(expected.sum()), abs=1e-4)
        assert greedy == likely
    assert len({nats for nats, _ in found}) == len(found)
    # The model reads 24 tokens and predicts one more.
    assert model._truncated(list(range(60)), [60, 61]) == (list(range(37, 60)), [60, 61])


def test_the_greedy_continuation_is_recognized(model, generator):
    context = [*generator.served.texts.start, *ids("a bad")]
    (result,) = generator.generate([context], max_tokens=3)
    other = [*result.tokens[:2], (result.tokens[2] + 1) % 256]
    found = model._loglikelihood_tokens([(None, context, tokens) for tokens in (result.tokens, other)])
    assert [greedy for _, greedy in found] == [True, False]
    assert found[0][0] == pytest.approx(sum(result.log_probs), abs=1e-4)


def test_rolling_windows_are_those_of_lm_eval(model, generator):
    """Windows of 24 tokens: each token is predicted once, and the last window reads 24 tokens."""
    tokens, start = ids(TEXT.decode()[:60]), generator.served.texts.start[0]
    windows = [
        ([start], tokens[:24]),
        (tokens[23:24], tokens[24:48]),
        (tokens[35:48], tokens[48:60]),
    ]
    expected = sum(float(nats.sum()) for nats, _ in generator.scores(windows))
    found = model.loglikelihood_rolling([request(TEXT.decode()[:60]), request("")])
    assert found == [pytest.approx(expected, abs=1e-4), 0.0]


def test_answers_end_at_strings_and_lengths(model, generator):
    (free,) = generator.generate([[*generator.served.texts.start, *ids("a bad")]], max_tokens=8)
    requests = [
        request("a bad", {"until": [], "max_gen_toks": 8}),
        request("a bad", {"until": [free.text[1:2], ""], "max_gen_toks": 8, "do_sample": False, "temperature": 0.7}),
        request("a bad", {"until": "\n\n", "max_new_tokens": 2}),
        request("x" * 50, {"until": [], "max_gen_toks": 8}),
    ]
    found = model.generate_until(requests)
    assert found[0] == free.text
    assert found[1] == free.text[: free.text.index(free.text[1])]
    assert found[2] == generator.generate([[*generator.served.texts.start, *ids("a bad")]], max_tokens=2)[0].text
    assert found[3] == generator.generate([ids("x" * (LENGTH - 8))], max_tokens=8)[0].text


def test_options_that_are_not_supported_are_errors(model, generator):
    from ringattn.generation.lm_eval import RingModel, generation_options

    with pytest.raises(
        ValueError, match=r"generation_kwargs: num_beams is not supported; supported are until, max_gen"
    ):
        model.generate_until([request("a", {"until": [], "num_beams": 2})])
    with pytest.raises(ValueError, match=r"max_gen_toks=24 must be less than max_length=24; load the model with a la"):
        model.generate_until([request("a", {"until": [], "max_gen_toks": 24})])
    with pytest.raises(ValueError, match=r"a continuation of 25 tokens is longer than max_length=24"):
        model.loglikelihood([request("a", "b" * 25)])
    with pytest.raises(
        ValueError, match=r"max_length=25 must be from 1 to 24, the cache less one; load .*cache_tokens=26$"
    ):
        RingModel(generator, max_length=25)
    with pytest.raises(ValueError, match="apply_chat_template is not supported"):
        model.apply_chat_template([])
    given = {"do_sample": True, "temperature": 0.5, "top_k": 0, "top_p": 0.9, "until": "."}
    assert generation_options(given) == {"max_tokens": 256, "stop": ["."], "temperature": 0.5, "top_p": 0.9}


def write_tasks(directory):
    """Writes a task of multiple choice, one of generation and one of perplexity; each has its questions in a file."""
    questions = [
        {"question": "a dead", "choices": [" bed", " jade", " cafe"], "answer": 0},
        {"question": "a big", "choices": [" bag", " bee"], "answer": 1},
        {"question": "a jade", "choices": [" bead", " decade"], "answer": 0},
    ]
    texts = [{"text": TEXT.decode()[:60]}, {"text": "a cafe"}]
    for name, rows in (("questions", questions), ("texts", texts)):
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {"dataset_path": "json", "test_split": "test", "num_fewshot": 0}
    accuracy = {"metric": "acc", "aggregation": "mean", "higher_is_better": True}
    tasks = {
        "tiny_choice": {"output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}"}
        | {"doc_to_target": "{{answer}}", "target_delimiter": "", "metric_list": [accuracy]},
        "tiny_answer": {"output_type": "generate_until", "doc_to_text": "{{question}}"}
        | {"doc_to_target": "{{choices[answer]}}", "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4}}
        | {"metric_list": [{"metric": "bypass", "aggregation": "bypass", "higher_is_better": True}]},
        "tiny_text": {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}"}
        | {"metric_list": [{"metric": "byte_perplexity", "aggregation": "weighted_perplexity"}]},
    }
    for name, task in tasks.items():
        file = directory / ("texts.jsonl" if name == "tiny_text" else "questions.jsonl")
        content = {"task": name, **common, **task, "dataset_kwargs": {"data_files": {"test": str(file)}}}
        (directory / f"{name}.yaml").write_text(json.dumps(content))  # JSON is YAML
    return questions


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """Keeps lm-eval from the network, and from reading its 14,000 tasks, which takes many seconds."""
    import datasets  # pyright: ignore[reportMissingImports]
    import lm_eval.tasks  # pyright: ignore[reportMissingImports]

    own = partial(lm_eval.tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", own)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def test_tasks_run_end_to_end(run, model, tmp_path, offline, capsys):
    """The command as a user runs it, and the same results from our scores."""
    from ringattn.generation import lm_eval

    questions, output = write_tasks(tmp_path), tmp_path / "results.json"
    flags = ["--tasks", "tiny_choice", "tiny_answer", "tiny_text", "--include_path", str(tmp_path)]
    lm_eval.main([str(run), *flags, "--max_length", str(LENGTH), "--batch_size", "2", "--output", str(output)])
    assert "|tiny_choice|" in capsys.readouterr().out.replace(" ", "")
    results = json.loads(output.read_text())["results"]
    assert results.keys() == {"tiny_choice", "tiny_answer", "tiny_text"}
    pairs = [request(each["question"], choice) for each in questions for choice in each["choices"]]
    scores = iter([nats for nats, _ in model.loglikelihood(pairs)])
    best = [int(np.argmax([next(scores) for _ in each["choices"]])) for each in questions]
    right = sum(choice == each["answer"] for choice, each in zip(best, questions, strict=True))
    assert results["tiny_choice"]["acc,none"] == pytest.approx(right / 3)
    nats = model.loglikelihood_rolling([request(TEXT.decode()[:60]), request("a cafe")])
    assert results["tiny_text"]["byte_perplexity,none"] == pytest.approx(math.exp(-sum(nats) / 66), rel=1e-5)


def test_an_unknown_task_is_an_error(run, tmp_path, offline, capsys):
    from ringattn.generation import lm_eval

    write_tasks(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        lm_eval.main([str(run), "--tasks", "tiny_chioce", "--include_path", str(tmp_path)])
    assert capsys.readouterr().err.startswith("error: --tasks: unknown 'tiny_chioce': did you mean 'tiny_choice'?")


def test_the_log_likelihood_is_the_loss_of_our_evaluation(run, tmp_path):
    """Of a text that is one row: the loss of scripts/eval.py, lm-eval's log-likelihood and the scores are equal."""
    from ringattn.generation.lm_eval import RingModel

    text = TEXT[:64]
    (tmp_path / "one.txt").write_bytes(text)
    c = config.Evaluation(
        name="loss",
        runs=(str(run),),
        tasks=("loss_by_position",),
        lengths=(64,),
        path=str(tmp_path / "one.txt"),
        batch_size=1,
        mesh=config.Mesh(context=8),
    )
    assert evaluate(c) == 0
    (result,) = results_of(c)
    assert result["tokens"] == len(text)
    model = RingModel.load(run, max_length=64, batch_size=1)
    (nats,) = model.loglikelihood_rolling([request(text.decode())])
    assert -nats / len(text) == pytest.approx(result["loss"], abs=1e-5)
    start = list(model.generator.served.texts.start)
    assert model.generator.score(start, text.decode()).sum() == pytest.approx(nats, abs=1e-4)
