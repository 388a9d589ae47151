"""Training from a checkpoint: its shape and tokenizer are adopted, its parameters are the initial ones."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_file_tokenizer import train as make_tokenizer

from ringattn import config, evaluation, weights
from ringattn.config import Checkpoint, Config, Data, Log, Mesh, Model, Optimizer, Train, Validation
from ringattn.runs.metrics import read_rows
from ringattn.training import train

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    """A directory with a run, and with its model in the format of Hugging Face."""
    directory = tmp_path_factory.mktemp("origin")
    make_tokenizer(["<pad>", "<|endoftext|>"]).save(str(directory / "tokenizer.json"))
    c = Config(
        name="first",
        model=Model(family="qwen3", layers=1, dim=32, heads=2, kv_heads=1, head_dim=8, feed_forward=32),
        data=Data(path=str(ROOT / "ringattn" / "attn"), tokenizer=str(directory / "tokenizer.json"), seq_len=64),
        mesh=Mesh(context=2, data=-1),
        optimizer=Optimizer(warmup_steps=1),
        train=Train(steps=2),
        validation=Validation(batches=1),
        checkpoint=Checkpoint(every=1),
        log=Log(every=1, directory=str(directory)),
    )
    assert train(c) == 0
    weights.save(weights.load(directory / "first", c.mesh), directory / "hf")
    return directory


def tuned(directory: Path, name: str, path: str | Path, **model) -> Config:
    """Returns a config with the data of the first run, which starts from the checkpoint at `path`."""
    c = config.load(directory / "first" / "config.json")
    return replace(
        c, name=name, model=Model(weights=str(path), **model), data=replace(c.data, tokenizer="bytes"), resume="auto"
    )


def test_training_starts_from_the_parameters_and_resumes_without_the_checkpoint(directory):
    copy = directory / "copy"
    shutil.copytree(directory / "hf", copy)
    given = tuned(directory, "tuned", copy, dtype="float32", remat="on")
    c = weights.adopt(replace(given, optimizer=replace(given.optimizer, learning_rate=1e-30)))
    assert train(c) == 0
    before, after = (read_rows(directory / name / "metrics.jsonl") for name in ("first", "tuned"))
    assert after[-1]["eval/loss"] == pytest.approx(before[-1]["eval/loss"], rel=1e-5)
    assert (directory / "tuned" / "tokenizer.json").read_bytes() == (copy / "tokenizer.json").read_bytes()
    shutil.rmtree(copy)
    longer = replace(given, optimizer=c.optimizer, train=replace(c.train, steps=3))
    assert weights.adopt(longer).model == c.model
    assert train(weights.adopt(longer)) == 0
    assert read_rows(directory / "tuned" / "metrics.jsonl")[-1]["step"] == 3


@pytest.mark.parametrize("source", ["hf", "first"])
def test_the_model_section_is_that_of_the_checkpoint(directory, source):
    c = weights.adopt(tuned(directory, "new", directory / source, rope_scaling="yarn", rope_factor=4.0))
    first = config.load(directory / "first" / "config.json").model
    for name in ("family", "layers", "dim", "heads", "kv_heads", "head_dim", "feed_forward", "rope_theta", "tied"):
        assert vars(c.model)[name] == vars(first)[name], name
    assert (c.model.rope_scaling, c.model.rope_factor, c.model.rope_original) == ("yarn", 4.0, 64)
    assert c.model.vocabulary == weights.load(directory / "hf", c.mesh).config.vocabulary
    assert Path(c.data.tokenizer).is_file()


@pytest.mark.parametrize(
    ("explicit", "model", "message"),
    [
        ((), {"layers": 3}, r"model.layers=3, but model.weights='.*hf' has 1; use --model.layers 1, or leave out"),
        (("model.dim",), {}, r"model.dim=256, but model.weights='.*hf' has 32; use --model.dim 32, or leave out"),
        ((), {"family": "llama"}, None),
        (("model.family",), {}, r"model.family='llama', but .* has 'qwen3'"),
    ],
)
def test_a_contradiction_names_both_values(directory, explicit, model, message):
    c = tuned(directory, "new", directory / "hf", **model)
    if message is None:
        assert weights.adopt(c, explicit).model.family == "qwen3"
        return
    with pytest.raises(ValueError, match=message):
        weights.adopt(c, explicit)


def test_another_tokenizer_is_a_contradiction(directory):
    c = tuned(directory, "new", directory / "hf")
    with pytest.raises(ValueError, match=r"data.tokenizer='dna', but model.weights='.*hf' has the tokenizer '.*json'"):
        weights.adopt(replace(c, data=replace(c.data, tokenizer="dna")))


def test_a_config_that_was_not_adopted_is_an_error(directory):
    with pytest.raises(ValueError, match=r"model.weights='.*hf' has .*; pass adopt\(config\)"):
        train(tuned(directory, "new", directory / "hf"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"added_tokens": [', "is not a valid JSON object"),
        ('{"added_tokens": [{"id": 1}]}', "added_tokens must be a list"),
    ],
)
def test_a_damaged_tokenizer_is_named(directory, tmp_path, content, message):
    shutil.copytree(directory / "hf", tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.json").write_text(content)
    origin = weights.find_origin(str(tmp_path / "hf"))
    with pytest.raises(ValueError, match=rf"hf/tokenizer.json:? {message}"):
        origin.tokenizer(Data())


@pytest.mark.parametrize("user", ["~no-such-user/model"])
def test_an_unknown_home_directory_is_no_checkpoint(user):
    for read in (weights.find_origin, weights.load):
        with pytest.raises(ValueError, match=f"{user} does not exist; use a Hugging Face directory"):
            read(user)


def test_a_missing_checkpoint_is_an_error(directory):
    with pytest.raises(ValueError, match="nowhere does not exist; use a Hugging Face directory"):
        weights.adopt(tuned(directory, "new", directory / "nowhere"))


def test_weights_are_evaluated_as_the_run_that_they_come_from(directory, monkeypatch):
    monkeypatch.chdir(directory)
    options = {
        "tasks": ("loss_by_kind",),
        "lengths": (64,),
        "samples": 4,
        "batch_size": 4,
        "mesh": Mesh(context=2, data=-1),
    }
    path = str(ROOT / "ringattn" / "attn")
    given = config.Evaluation(model=Model(weights="hf"), path=path, **options)
    losses = []
    for c, where in (
        (evaluation.adopt(given), "runs/hf"),
        (config.Evaluation(runs=("first",), path=path, **options), "first"),
    ):
        assert evaluation.evaluate(c) == 0
        rows = (directory / where / "evaluations" / "evaluation" / "cells.jsonl").read_text().splitlines()
        losses.append([json.loads(row)["result"] for row in rows])
    assert losses[0] == losses[1]


def needles_in_a_chat(**subject: Any) -> config.Evaluation:
    """An evaluation of four rows in the chat template."""
    return config.Evaluation(
        tasks=("needle",),
        lengths=(256,),
        depths=(0.5,),
        samples=4,
        batch_size=4,
        longer=True,
        chat=True,
        mesh=Mesh(context=2, data=-1),
        **subject,
    )


def test_retrieval_uses_the_chat_template_of_the_checkpoint(directory, monkeypatch):
    monkeypatch.chdir(directory)
    given = needles_in_a_chat(name="chat", model=Model(weights="chat"))
    shutil.copytree(directory / "hf", directory / "chat")
    with pytest.raises(ValueError, match=r"chat=True requires .* with a chat_template.jinja.*, but chat has none; use"):
        evaluation.evaluate(evaluation.adopt(given))
    template = "{{ '<pad>user\n' + messages[0].content + '<pad>assistant\n' }}"
    (directory / "chat" / "chat_template.jinja").write_text(template)
    for c in (given, replace(given, chat=False)):
        assert evaluation.evaluate(evaluation.adopt(c)) == 0
    rows = (directory / "runs" / "chat" / "evaluations" / "chat" / "cells.jsonl").read_text().splitlines()
    with_template, without = (json.loads(row)["result"] for row in rows)  # two cells, because their rows differ
    assert with_template["nats"] != without["nats"]


def test_a_run_stores_the_chat_template_that_it_starts_with(directory, monkeypatch):
    monkeypatch.chdir(directory)
    instruct = directory / "instruct"
    shutil.copytree(directory / "hf", instruct)
    template = "{{ bos_token }}{{ '<pad>user\n' + messages[0].content + '<pad>assistant\n' }}"
    settings = json.dumps({"bos_token": "<pad>", "eos_token": "<pad>", "chat_template": "of another file"}).encode()
    stored = {
        "chat_template.jinja": template.encode(),
        "tokenizer_config.json": settings,
        "generation_config.json": b'{"eos_token_id": [0, 1]}',
    }
    for name, content in stored.items():
        (instruct / name).write_bytes(content)
    expected = weights.find_origin("instruct").chat_template
    assert expected is not None
    assert train(weights.adopt(tuned(directory, "from_instruct", "instruct"))) == 0
    c = tuned(directory, "from_run", "from_instruct")
    assert train(weights.adopt(replace(c, data=replace(c.data, seq_len=32)))) == 0
    # Training in shorter rows does not shorten the context.
    assert weights.find_origin("from_run").context == 64
    weights.save_run(weights.load("instruct", Mesh(context=2, data=-1)), "converted")
    shutil.rmtree(instruct)
    for run in ("from_instruct", "from_run", "converted"):
        found = weights.find_origin(run).chat_template
        assert found == replace(expected, source=str(Path(run) / "chat_template.jinja")), run
        weights.save(weights.load(run, Mesh(context=2, data=-1)), f"hf_{run}")
        assert {name: (directory / f"hf_{run}" / name).read_bytes() for name in stored} == stored, run
        content = json.loads((directory / f"hf_{run}" / "config.json").read_bytes())
        assert (content["bos_token_id"], content["eos_token_id"], content["max_position_embeddings"]) == (0, 0, 64), run
    c = needles_in_a_chat(runs=("from_run",))
    assert evaluation.evaluate(c) == 0


def test_weights_are_compared_with_a_run_on_its_held_out_text(directory, monkeypatch):
    monkeypatch.chdir(directory)
    c = config.Evaluation(
        name="both",
        runs=("first",),
        model=Model(weights="hf"),
        tasks=("loss_by_position",),
        lengths=(64,),
        samples=4,
        batch_size=4,
        mesh=Mesh(context=2, data=-1),
    )
    assert evaluation.evaluate(evaluation.adopt(c, ("runs",))) == 0
    run, checkpoint = json.loads((directory / "first/evaluations/both/comparison/results.json").read_bytes())["results"]
    assert run | {"run": ""} == checkpoint | {"run": ""}
    path = directory / "other"
    shutil.copytree(directory / "hf", path)
    content = json.loads((path / "tokenizer.json").read_bytes())
    (path / "tokenizer.json").write_text(json.dumps(content | {"truncation": None}, indent=1))
    with pytest.raises(
        ValueError, match=r"other has another tokenizer than first, so .*; choose a text .* with --path"
    ):
        evaluation.evaluate(evaluation.adopt(replace(c, model=Model(weights="other")), ("runs",)))
