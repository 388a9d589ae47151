"""Evaluation from a run's folder to its report, on any mesh, layout and strategy."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ringattn import config
from ringattn.data import haystack, load_tokenizer, question
from ringattn.data.corpus import encode, gather
from ringattn.data.formats import Document
from ringattn.evaluation import evaluate, kept, losses, retrieval
from ringattn.evaluation import run as evaluation_run
from ringattn.evaluation.report import tables
from ringattn.evaluation.retrieval import wilson
from ringattn.training import train
from ringattn.training.score import Scores

LONG, SHORT = 384, 256


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folders of two runs of a few steps, on documents of two kinds."""
    folder = tmp_path_factory.mktemp("evaluation")
    rng = np.random.default_rng(0)
    for kind in ("txt", "md"):
        for number in range(20):
            text = rng.integers(97, 107, 200 + 40 * number, dtype=np.uint8).tobytes()
            (folder / f"{number}.{kind}").write_bytes(text)
    c = config.Config(
        name="one",
        model=config.Model(layers=1, dim=16, heads=4, kv_heads=2, head_dim=8, feed_forward=32),
        data=config.Data(path=str(folder / "*.*"), seq_len=LONG, validation=0.4),
        mesh=config.Mesh(context=8),
        train=config.Train(steps=4, batch_size=2),
        log=config.Log(directory=str(folder / "runs")),
    )
    assert train(c) == 0
    assert train(replace(c, name="two", train=replace(c.train, seed=1), checkpoint=config.Checkpoint(every=2))) == 0
    rows = replace(c.data, path=("task:needle:128", "task:needle:384"))
    assert train(replace(c, name="asked", data=rows, train=replace(c.train, steps=2))) == 0
    return folder / "runs"


@pytest.fixture
def asked(trained, tmp_path):
    """All that a model of a few steps can be asked, of a copy of its run's folder."""
    shutil.copytree(trained, tmp_path / "runs")
    return config.Evaluation(
        name="all",
        runs=(str(tmp_path / "runs" / "one"),),
        tasks=("needle", "multi_key", "loss_by_position", "loss_by_context", "loss_by_kind"),
        lengths=(SHORT, LONG),
        depths=(0.0, 1.0),
        samples=5,
        batch_size=2,
        mesh=config.Mesh(context=8),
    )


def folder_of(c, number=0):
    return Path(c.runs[number]) / "evaluations" / c.name


def results_of(c, number=0):
    return json.loads((folder_of(c, number) / "results.json").read_text())["results"]


def test_leaves_numbers_a_table_and_pictures(asked, capsys):
    c = replace(
        asked,
        tasks=("needle", "multi_query", "loss_by_position", "loss_by_context", "loss_by_kind"),
        lengths=(LONG,),
        depths=(0.5,),
    )
    assert evaluate(c) == 0
    needle, queries, position, context, kinds = results_of(c)
    assert (needle["task"], needle["length"], needle["depth"], needle["samples"]) == ("needle", LONG, 0.5, 5)
    assert needle["right"] == 0
    assert (needle["low"], needle["high"]) == (0.0, pytest.approx(0.4345, abs=1e-4))
    # A model that knows nothing finds each byte about equally likely.
    assert needle["nats"] == pytest.approx(8 * np.log(257), rel=0.2)
    assert queries["depth"] is None
    assert position["tokens"] == 5 * LONG
    assert position["loss"] == pytest.approx(np.log(257), rel=0.1)
    assert position["bits_per_byte"] == pytest.approx(position["loss"] / np.log(2), rel=0.01)
    assert position["by_position"][0]["first"] == 0
    assert position["by_position"][-1]["last"] == LONG - 1
    assert context["scored"] == LONG // 2
    assert [each["kind"] for each in kinds["kinds"]] == [".md", ".txt"]
    folder = folder_of(c)
    assert {path.name for path in (folder / "plots").iterdir()} == {
        *("needle.png", "retrieval.png", "loss_by_position.png", "loss_by_context.png", "loss_by_kind.png")
    }
    table = (folder / "table.md").read_text()
    assert "| 384 | 0.000 (0.00 to 0.43) |" in table
    out = capsys.readouterr().out
    assert "1/5  one: needle, 384 tokens, depth 50%: 0 of 5 right" in out
    assert table in out


def test_a_loss_is_what_a_validation_finds(asked):
    """The evaluation's loss over all held-out rows is the training loop's, which calls the same code."""
    run = Path(asked.runs[0])
    found = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    c = replace(asked, tasks=("loss_by_kind",), lengths=(LONG,), samples=1000)
    assert evaluate(c) == 0
    (result,) = results_of(c)
    tokens = sum(each["tokens"] for each in result["kinds"])
    loss = sum(each["loss"] * each["tokens"] for each in result["kinds"]) / tokens
    assert loss == pytest.approx(found["eval/loss"], rel=0.01)  # other rows of the same documents


@pytest.mark.parametrize(
    ("mesh", "layout", "strategy"),
    [
        (config.Mesh(context=1, data=8), "contiguous", "gather"),
        (config.Mesh(context=2, data=4), "contiguous", "ring"),
        (config.Mesh(context=4, data=2), "striped", "gather"),
        (config.Mesh(context=2, data=4), "zigzag", "ulysses"),
        (config.Mesh(context_outer=2, context=2, data=2), "zigzag", "usp"),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_numbers_do_not_depend_on_mesh_layout_and_strategy(asked, mesh, layout, strategy):
    c = replace(asked, batch_size=8)
    other = replace(c, name="other", mesh=mesh, layout=layout, strategy=strategy)
    for each in (c, other):
        (Path(asked.runs[0]) / "evaluations").mkdir(exist_ok=True)
        assert evaluate(each) == 0
    for one, two in zip(results_of(c), results_of(other), strict=True):
        if "rate" in one:
            assert one["right"] == two["right"]
            assert one["nats"] == pytest.approx(two["nats"], abs=1e-4)
        elif "loss" in one:
            assert one["loss"] == pytest.approx(two["loss"], abs=1e-5)


def test_a_stopped_evaluation_goes_on_where_it_was(asked, monkeypatch, capsys):
    assert evaluate(replace(asked, name="whole")) == 0
    measured, usual = [], evaluation_run._measured

    def counted(score, tokenizer, c, cell, text):
        measured.append(cell)
        if len(measured) == 6:
            raise KeyboardInterrupt
        return usual(score, tokenizer, c, cell, text)

    monkeypatch.setattr(evaluation_run, "_measured", counted)
    assert evaluate(asked) == 130
    assert "stopped: the same command goes on from here" in capsys.readouterr().out
    assert not (folder_of(asked) / "results.json").exists()
    with (folder_of(asked) / "cells.jsonl").open("a") as file:
        file.write('{"key": "0123')  # a line that was being written when the power failed
    assert evaluate(asked) == 0
    assert len(measured) == len(set(measured)) + 1 == len(list(evaluation_run.cells(asked))) + 1
    assert results_of(asked) == results_of(replace(asked, name="whole"))
    assert "(was there)" in capsys.readouterr().out
    assert evaluate(asked) == 0
    assert len(measured) == len(list(evaluation_run.cells(asked))) + 1
    # Other questions are asked anew, and what was answered before stays.
    assert evaluate(replace(asked, samples=4, tasks=("needle",))) == 0
    assert evaluate(asked) == 0
    assert len(measured) == len(list(evaluation_run.cells(asked))) + 1 + 4


def test_a_cell_is_not_taken_from_another_model_or_text(asked, monkeypatch):
    c = replace(asked, tasks=("needle", "loss_by_kind"), lengths=(LONG,), depths=(0.5,))
    assert evaluate(c) == 0
    lines = len((folder_of(c) / "cells.jsonl").read_text().splitlines())
    path = Path(c.runs[0]) / "config.json"
    before = path.read_text()
    path.write_text(before.replace('"window": null', '"window": 4'))
    assert evaluate(c) == 0
    assert len((folder_of(c) / "cells.jsonl").read_text().splitlines()) == 2 * lines
    path.write_text(before)
    monkeypatch.setattr(haystack, "sentences", lambda: ("This is another haystack, of one sentence.",))
    assert evaluate(c) == 0
    assert len((folder_of(c) / "cells.jsonl").read_text().splitlines()) == 2 * lines + 1


def test_text_that_is_no_longer_what_it_was_is_refused(asked):
    path = Path(asked.runs[0]) / "data.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"validation": "0"}))
    with pytest.raises(
        ValueError, match=r"is not what one was trained on: put it back .* or name other text by --path"
    ):
        evaluate(asked)
    assert evaluate(replace(asked, tasks=("needle",), samples=1)) == 0


def test_runs_on_texts_of_their_own_are_not_compared_in_silence(asked, capsys):
    runs = asked.runs[0], str(Path(asked.runs[0]).parent / "asked")
    c = replace(asked, runs=runs, tasks=("loss_by_kind",))
    assert evaluate(c) == 0
    assert "Each run was scored on its own held-out text" in (folder_of(c) / "comparison" / "table.md").read_text()
    assert evaluate(replace(c, runs=runs[:1], lengths=(SHORT,))) == 0
    assert "own held-out" not in (folder_of(c) / "table.md").read_text()


def test_nothing_finished_is_lost_when_it_cannot_write(asked, monkeypatch):
    assert evaluate(replace(asked, tasks=("needle",))) == 0
    before = (folder_of(asked) / "cells.jsonl").read_bytes()

    def full(self, *_, **__):
        raise OSError(28, "No space left on device")

    own = kept.Kept(folder_of(asked) / "cells.jsonl")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        with pytest.raises(ValueError, match=r"\(No space left on device\): .* what was finished is kept"):
            own.add("key", {})
    assert (folder_of(asked) / "cells.jsonl").read_bytes() == before


def test_several_runs_are_compared(asked, capsys):
    c = replace(asked, runs=(asked.runs[0], str(Path(asked.runs[0]).parent / "two")))
    assert evaluate(c) == 0
    for number, name in enumerate(("one", "two")):
        assert {each["run"] for each in results_of(c, number)} == {name}
    both = json.loads((folder_of(c) / "comparison" / "results.json").read_text())
    assert both["runs"] == {"one": 4, "two": 4}
    assert [each["run"] for each in both["results"]] == ["one"] * 14 + ["two"] * 14
    assert "## needle of two: exact match" in (folder_of(c) / "comparison" / "table.md").read_text()
    assert (folder_of(c) / "comparison" / "plots" / "loss_by_context.png").read_bytes().startswith(b"\x89PNG")
    assert results_of(c, 0) != [each | {"run": "one"} for each in results_of(c, 1)]


def test_a_single_checkpoint_can_be_named(asked):
    two = Path(asked.runs[0]).parent / "two"
    c = replace(asked, runs=(str(two / "checkpoints" / "2"), str(two)), tasks=("loss_by_context",))
    assert evaluate(c) == 0
    early, late = (json.loads((two / "evaluations" / name / "results.json").read_text()) for name in ("all@2", "all"))
    assert (early["step"], late["step"]) == (2, 4)
    assert early["results"][0]["run"] == "two@2"
    assert early["results"][0]["loss"] != late["results"][0]["loss"]


def test_a_model_that_was_trained_on_a_task_is_asked_in_rows_of_any_length(asked):
    c = replace(asked, runs=(str(Path(asked.runs[0]).parent / "asked"),), tasks=("needle", "loss_by_kind"))
    assert evaluate(c) == 0
    assert [len(each.get("kinds", ())) for each in results_of(c)] == [0, 0, 0, 0, 1, 1]


def test_text_can_be_another(asked, tmp_path):
    (tmp_path / "other.txt").write_bytes(b"ab" * 400)
    c = replace(asked, tasks=("loss_by_position", "loss_by_kind"), path=str(tmp_path / "other.txt"), lengths=(LONG,))
    assert evaluate(c) == 0
    position, kinds = results_of(c)
    assert position["rows"] == 2  # of 801 tokens, with the boundary
    assert [each["kind"] for each in kinds["kinds"]] == [".txt"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"runs": ("nothing",)}, r"nothing holds no run, for it has no config.json: train one"),
        (
            {"lengths": (LONG, 2 * LONG)},
            r"lengths: 768, but one was trained on rows of 384: use at most 384, or",
        ),
        ({"lengths": (100,)}, r"lengths=100 must be a positive multiple of 2 \* context = 16.*: use 96 or 112"),
        ({"tasks": ("where_thing",), "lengths": (128,)}, r"where_thing needs rows of more than \d+ tokens, not of 128"),
        ({"mesh": config.Mesh(data=8, context=1)}, r"batch_size=2 must be a multiple of mesh.data = 8: use 8"),
        ({"strategy": "ulysses"}, r"one cannot be evaluated on this mesh .*kv_heads=2.*: choose another --mesh"),
        ({"mesh": config.Mesh(context=3)}, r"mesh .*context=3.* does not fit 8 devices"),
        ({"path": "nowhere"}, r"'nowhere' is neither a file nor a folder"),
        ({"lengths": (1024,), "longer": True}, r"no document of 1024 tokens, the longest has \d+: use --lengths of at"),
    ],
)
def test_a_mistake_is_one_message(asked, change, message):
    with pytest.raises(ValueError, match=message):
        evaluate(replace(asked, **change))
    assert not folder_of(asked).exists()


def test_a_run_without_a_good_checkpoint_is_refused(asked):
    run = Path(asked.runs[0])
    with pytest.raises(ValueError, match=r"one has no checkpoint 3: there are 4"):
        evaluate(replace(asked, runs=(str(run / "checkpoints" / "3"),)))
    assert evaluate(replace(asked, runs=(str(run / "checkpoints"),), tasks=("needle",), samples=1)) == 0
    for path in (run / "checkpoints" / "4" / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"checkpoints/4 is damaged \(.*\): name another checkpoint"):
        evaluate(asked)
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(ValueError, match=r"one has no checkpoint: python scripts/train.py --config .*one/config.json"):
        evaluate(asked)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tasks": ("needel",)}, r"tasks: unknown 'needel': did you mean 'needle'\?"),
        ({"tasks": ("needle", "needle")}, "tasks=.* must be different from one another"),
        ({"depths": (0.0, 1.5)}, "depths=.* must be between 0 and 1 each"),
        ({"samples": 0}, "samples=0 must be at least 1"),
        ({"lengths": (1,)}, "lengths=.* must be at least 2 each"),
    ],
)
def test_a_config_checks_itself(values, message):
    with pytest.raises(ValueError, match=message):
        config.Evaluation(**values)


class Oracle:
    """Says what it is told to in the place of a model."""

    def __init__(self, change):
        self.change = change

    def __call__(self, batches):
        for batch in batches:
            best = batch.targets.copy()
            nats = np.zeros(best.shape, np.float32)
            self.change(best, nats)
            yield Scores(nats, best)


def test_a_row_is_right_if_all_of_its_answer_is(asked):
    c = replace(asked, samples=3)

    def measured(change):
        return retrieval.measure(Oracle(change), load_tokenizer("bytes"), c, "multi_value", LONG, 0.0)

    row = question("multi_value", load_tokenizer("bytes"), LONG, 0.0, "0 0")
    first, last = row.ends[0] - 1, row.ends[-1] - 2  # whose targets are the first and last answer tokens
    assert measured(lambda best, nats: None)["right"] == 3

    def wrong_at(place):
        def change(best, nats):
            best[0, place] += 1
            nats[0, place] += 6.0

        return change

    for place, wrong in ((first - 1, 0), (first, 1), (last, 1), (last + 1, 0)):
        found = measured(wrong_at(place))
        # Two batches of two rows; the last row of the second is filled up, and counts for nothing.
        assert found["right"] == 3 - 2 * wrong
        assert found["answers"] == pytest.approx(1 - 2 * wrong * 0.25 / 3)
        assert found["nats"] == pytest.approx(2 * wrong * 6.0 / 3)


def test_wilsons_interval():
    assert wilson(0, 10) == (0.0, pytest.approx(0.2775, abs=1e-4))
    assert wilson(10, 10) == (pytest.approx(0.7225, abs=1e-4), 1.0)
    assert wilson(50, 100) == (pytest.approx(0.4038, abs=1e-4), pytest.approx(0.5962, abs=1e-4))


def test_the_same_tokens_are_scored_whatever_the_length(asked):
    """Rows of every length end in the same places."""
    rng = np.random.default_rng(0)
    documents = [Document(str(number), rng.bytes(700)) for number in range(3)]
    corpus, _, kinds = gather(encode(documents, load_tokenizer("bytes")), load_tokenizer("bytes"))
    text, seen = losses.Text([corpus], [kinds]), []

    class Seen(Oracle):
        def __call__(self, batches):
            for batch in batches:
                seen.append(batch.targets[:, -SHORT // 2 :])
                nats = np.zeros(batch.targets.shape, np.float32)
                nats[:, -SHORT // 2 :] = 1.0
                yield Scores(nats, batch.targets)

    c = replace(asked, batch_size=6)
    for length in c.lengths:
        found = losses.by_context(Seen(None), load_tokenizer("bytes"), c, text, length)
        assert found["loss"] == 1.0
        assert found["tokens"] == 3 * SHORT // 2
    np.testing.assert_array_equal(*seen)


def test_a_change_is_told_by_rows_in_pairs():
    """Rows that are hard at any length say nothing of the change; its error is that of their differences."""
    results = [
        {"length": 8, "row_nats": [9.0, 90.0, 900.0], "row_tokens": [3.0, 3.0, 3.0], "row_documents": [0, 1, 2]},
        {"length": 4, "row_nats": [10.0, 92.0, 903.0], "row_tokens": [3.0, 3.0, 3.0], "row_documents": [0, 1, 2]},
    ]
    longer, shortest = losses.changes(results)
    # The changes of rows are -1, -2 and -3, whose standard error is that of a mean of three, 1 / sqrt(3), in 3 tokens.
    assert longer == {"loss": pytest.approx(-6 / 9), "error": pytest.approx(1 / 3**0.5 / 3)}
    assert shortest == {"loss": 0, "error": 0}
    alike = [each | {"row_documents": [0, 0, 1]} for each in results]  # -1 and -2 of one document, -3 of another
    assert losses.changes(alike)[0]["error"] == pytest.approx((2 * (1 + 1)) ** 0.5 / 9)
    assert losses.changes([each | {"row_documents": [0, 0, 0]} for each in results])[0]["error"] is None
    figures = {
        "loss": 1.0,
        "bits_per_byte": None,
        "accuracy": 0.5,
        "tokens": 9,
        "task": "loss_by_context",
        "depth": None,
    }
    (table,) = tables({"run": [result | figures for result in results]})
    assert "| 8 | 1.0000 | 0.6667 ± 0.1925 | - | 50.0% | 9 | - | - |\n| 4 | 1.0000 | - | - |" in table
