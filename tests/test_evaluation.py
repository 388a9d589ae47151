"""Evaluation from a run directory to its report, on any mesh, layout and strategy."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import chex
import numpy as np
import pytest

from ringattn import config
from ringattn.data import dataset, haystack
from ringattn.evaluation import cells, evaluate
from ringattn.model import scoring
from ringattn.runs.lock import locked
from ringattn.training import train

LONG, SHORT = 384, 256


@pytest.fixture(scope="module")
def small_task_data():
    """Generates 65,536 tokens per task instead of four million."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dataset, "TASK_TOKENS", 2**16)
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory, small_task_data):
    """A directory with three short runs: two on documents of two kinds, one on a task."""
    directory = tmp_path_factory.mktemp("evaluation")
    rng = np.random.default_rng(0)
    for kind in ("txt", "md"):
        for number in range(20):
            text = rng.integers(97, 107, 200 + 40 * number, dtype=np.uint8).tobytes()
            (directory / f"{number}.{kind}").write_bytes(text)
    c = config.Config(
        name="one",
        model=config.Model(layers=1, dim=16, heads=4, kv_heads=2, head_dim=8, feed_forward=32),
        data=config.Data(path=str(directory / "*.*"), seq_len=LONG, validation=0.4),
        mesh=config.Mesh(context=8),
        train=config.Train(steps=4, batch_size=2),
        log=config.Log(directory=str(directory / "runs")),
    )
    assert train(c) == 0
    assert train(replace(c, name="two", train=replace(c.train, seed=1), checkpoint=config.Checkpoint(every=2))) == 0
    needles = replace(c.data, path=("task:needle:128", "task:needle:384"))
    assert train(replace(c, name="needles", data=needles, train=replace(c.train, steps=2))) == 0
    return directory / "runs"


def evaluation_in(directory):
    """Config of an evaluation with every kind of task, of the first run in the directory."""
    return config.Evaluation(
        name="all",
        runs=(str(directory / "one"),),
        tasks=("needle", "multi_key", "loss_by_position", "loss_by_context", "loss_by_kind"),
        lengths=(SHORT, LONG),
        depths=(0.0, 1.0),
        samples=5,
        batch_size=2,
        mesh=config.Mesh(context=8),
    )


@pytest.fixture
def base(runs, tmp_path):
    """Config of an evaluation, on a copy of the runs."""
    return evaluation_in(shutil.copytree(runs, tmp_path / "runs"))


@pytest.fixture(scope="module")
def ring_results(runs, tmp_path_factory):
    """Results on a ring of eight devices."""
    c = evaluation_in(shutil.copytree(runs, tmp_path_factory.mktemp("ring") / "runs"))
    assert evaluate(c) == 0
    return results_of(c)


def other_run(c, name):
    """The path of the run called `name`."""
    return str(Path(c.runs[0]).parent / name)


def output_of(c, number=0):
    return Path(c.runs[number]) / "evaluations" / c.name


def results_of(c, number=0):
    return json.loads((output_of(c, number) / "results.json").read_text())["results"]


def test_writes_results_a_table_and_plots(base, capsys):
    c = replace(
        base,
        tasks=("needle", "multi_query", "loss_by_position", "loss_by_context", "loss_by_kind"),
        lengths=(LONG,),
        depths=(0.5,),
    )
    with locked(Path(c.runs[0]) / ".lock", Path(c.runs[0]), "", ""):  # while the run trains
        assert evaluate(c) == 0
    needle, queries, position, context, kinds = results_of(c)
    assert (needle["task"], needle["length"], needle["depth"], needle["samples"]) == ("needle", LONG, 0.5, 5)
    assert needle["right"] == 0
    assert (needle["low"], needle["high"]) == (0.0, pytest.approx(0.4345, abs=1e-4))
    # A model of a few steps gives every byte about the same probability.
    assert needle["nats"] == pytest.approx(8 * np.log(257), rel=0.2)
    assert queries["depth"] is None
    assert position["tokens"] == 5 * LONG
    assert position["loss"] == pytest.approx(np.log(257), rel=0.1)
    assert position["bits_per_byte"] == pytest.approx(position["loss"] / np.log(2), rel=0.01)
    assert position["by_position"][0]["first"] == 0
    assert position["by_position"][-1]["last"] == LONG - 1
    assert context["scored"] == LONG // 2
    assert [part["kind"] for part in kinds["kinds"]] == [".md", ".txt"]
    output = output_of(c)
    assert {path.name for path in (output / "plots").iterdir()} == {
        *("needle.png", "retrieval.png", "loss_by_position.png", "loss_by_context.png", "loss_by_kind.png")
    }
    table = (output / "table.md").read_text()
    assert "| 384 | 0.000 (0.00 to 0.43) |" in table
    out = capsys.readouterr().out
    assert "1/5  one: needle, 384 tokens, depth 50%: 0 of 5 correct" in out
    assert table in out


def test_the_loss_equals_the_validation_loss(base):
    """The evaluation's loss over all held-out rows equals the training loop's validation loss."""
    run = Path(base.runs[0])
    validation = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    c = replace(base, tasks=("loss_by_kind",), lengths=(LONG,), samples=1000)
    assert evaluate(c) == 0
    (result,) = results_of(c)
    tokens = sum(part["tokens"] for part in result["kinds"])
    loss = sum(part["loss"] * part["tokens"] for part in result["kinds"]) / tokens
    assert loss == pytest.approx(validation["eval/loss"], rel=0.01)  # other rows of the same documents


@pytest.mark.parametrize(
    ("mesh", "layout", "strategy"),
    [
        (config.Mesh(context=1, data=8), "contiguous", "gather"),
        (config.Mesh(context=2, data=4), "contiguous", "ring"),
        (config.Mesh(context=4, data=2), "striped", "gather"),
        (config.Mesh(context=2, data=4), "zigzag", "ulysses"),
        (config.Mesh(context_outer=2, context=2, data=2), "zigzag", "usp"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_results_do_not_depend_on_mesh_layout_and_strategy(base, ring_results, mesh, layout, strategy):
    c = replace(base, batch_size=8, mesh=mesh, layout=layout, strategy=strategy)
    assert evaluate(c) == 0
    for one, two in zip(ring_results, results_of(c), strict=True):
        if "rate" in one:
            assert one["right"] == two["right"]
            assert one["nats"] == pytest.approx(two["nats"], abs=1e-4)
        elif "loss" in one:
            assert one["loss"] == pytest.approx(two["loss"], abs=1e-5)


def test_a_missing_run_is_refused_with_the_runs_that_can_be_evaluated(base, tmp_path):
    runs = ", ".join(str(tmp_path / "runs" / name) for name in ("needles", "one", "two"))
    with pytest.raises(ValueError, match=f"config.json is missing; use one of {runs}$"):
        evaluate(replace(base, runs=(other_run(base, "nope"),)))


def test_a_stopped_evaluation_resumes(base, ring_results, monkeypatch, capsys):
    measured, measure = [], cells._measure

    def stopping_measure(score, tokenizer, c, cell, text):
        measured.append(cell)
        if len(measured) == 6:
            raise KeyboardInterrupt
        return measure(score, tokenizer, c, cell, text)

    monkeypatch.setattr(cells, "_measure", stopping_measure)
    assert evaluate(base) == 130
    assert "stopped: run the same command again to resume" in capsys.readouterr().out
    assert not (output_of(base) / "results.json").exists()
    with (output_of(base) / "cells.jsonl").open("a") as file:
        file.write('{"key": "0123')  # a line that was being written when the power failed
    assert evaluate(base) == 0
    assert len(measured) == len(set(measured)) + 1 == len(list(cells.cells(base))) + 1
    assert results_of(base) == ring_results
    assert "(stored)" in capsys.readouterr().out
    assert evaluate(base) == 0
    assert len(measured) == len(list(cells.cells(base))) + 1
    # Other questions are computed, and the stored results of the earlier ones stay.
    assert evaluate(replace(base, samples=4, tasks=("needle",))) == 0
    assert evaluate(base) == 0
    assert len(measured) == len(list(cells.cells(base))) + 1 + 4


def test_scoring_compiles_once_per_length(base, monkeypatch):
    """All batches of a length, of any task, have one shape: the last one, with fewer rows, is padded.

    Rows of several documents have segment ids, so loss_by_kind has a program of its own.
    """
    c, compiles, subtask = (
        replace(base, tasks=("needle", "loss_by_position", "loss_by_kind")),
        [],
        cells.Display.subtask,
    )

    def observed(*args, **options):
        compiles.append(options["compiles"])
        return subtask(*args, **options)

    monkeypatch.setattr(cells.Display, "subtask", observed)
    assert c.samples % c.batch_size
    chex.clear_trace_counter()
    counted = chex.assert_max_traces(scoring.token_scores, n=2 * len(c.lengths))
    monkeypatch.setattr(scoring, "token_scores", counted)
    assert evaluate(c) == 0
    # The display says so: cells of depths 0 and 1 at the first length, then the same at the second, then other tasks.
    assert compiles == [True, False, True, False, *[False] * 2, *[True] * 2]


def test_stored_results_of_another_model_or_text_are_not_used(base, monkeypatch):
    c = replace(base, tasks=("needle", "loss_by_kind"), lengths=(LONG,), depths=(0.5,))
    assert evaluate(c) == 0
    lines = len((output_of(c) / "cells.jsonl").read_text().splitlines())
    path = Path(c.runs[0]) / "config.json"
    before = path.read_text()
    path.write_text(before.replace('"window": null', '"window": 4'))
    assert evaluate(c) == 0
    assert len((output_of(c) / "cells.jsonl").read_text().splitlines()) == 2 * lines
    path.write_text(before)
    monkeypatch.setattr(haystack, "sentences", lambda: ("This is another haystack, of one sentence.",))
    assert evaluate(c) == 0
    assert len((output_of(c) / "cells.jsonl").read_text().splitlines()) == 2 * lines + 1


def test_a_second_start_of_an_evaluation_is_refused(base):
    c = replace(base, runs=(*base.runs, other_run(base, "two")))
    with locked(output_of(c, 1) / ".lock", output_of(c, 1), "", ""):
        message = rf"^{output_of(c, 1)} is in use by process {os.getpid()} on .* or use another --name$"
        for each in (c, replace(c, runs=c.runs[::-1])):
            with pytest.raises(ValueError, match=message):
                evaluate(each)
            assert not (output_of(c) / "cells.jsonl").exists()
        assert [path.name for path in output_of(c, 1).iterdir()] == [".lock"]


def test_changed_text_is_an_error(base):
    path = Path(base.runs[0]) / "data.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"validation": "0"}))
    with pytest.raises(ValueError, match=r"has changed since one was trained; restore it, or choose other .* --path"):
        evaluate(base)
    assert evaluate(replace(base, tasks=("needle",), samples=1)) == 0


def test_a_comparison_of_runs_on_different_texts_has_a_warning(base, capsys):
    runs = base.runs[0], other_run(base, "needles")
    c = replace(base, runs=runs, tasks=("loss_by_kind",))
    assert evaluate(c) == 0
    assert "Each run was scored on its own held-out text" in (output_of(c) / "comparison" / "table.md").read_text()
    assert evaluate(replace(c, runs=runs[:1], lengths=(SHORT,))) == 0
    assert "own held-out" not in (output_of(c) / "table.md").read_text()


def test_several_runs_are_compared(base, capsys):
    c = replace(base, runs=(base.runs[0], other_run(base, "two")))
    assert evaluate(c) == 0
    for number, name in enumerate(("one", "two")):
        assert {result["run"] for result in results_of(c, number)} == {name}
    both = json.loads((output_of(c) / "comparison" / "results.json").read_text())
    assert both["runs"] == {"one": 4, "two": 4}
    assert [result["run"] for result in both["results"]] == ["one"] * 14 + ["two"] * 14
    assert "## needle of two: exact match" in (output_of(c) / "comparison" / "table.md").read_text()
    assert (output_of(c) / "comparison" / "plots" / "loss_by_context.png").read_bytes().startswith(b"\x89PNG")
    assert results_of(c, 0) != [result | {"run": "one"} for result in results_of(c, 1)]


def test_a_single_checkpoint_is_evaluated(base):
    two = Path(base.runs[0]).parent / "two"
    c = replace(base, runs=(str(two / "checkpoints" / "2"), str(two)), tasks=("loss_by_context",))
    assert evaluate(c) == 0
    early, late = (json.loads((two / "evaluations" / name / "results.json").read_text()) for name in ("all@2", "all"))
    assert (early["step"], late["step"]) == (2, 4)
    assert early["results"][0]["run"] == "two@2"
    assert early["results"][0]["loss"] != late["results"][0]["loss"]


def test_a_model_trained_on_a_task_is_evaluated_at_every_length(base):
    c = replace(base, runs=(other_run(base, "needles"),), tasks=("needle", "loss_by_kind"))
    assert evaluate(c) == 0
    assert [len(result.get("kinds", ())) for result in results_of(c)] == [0, 0, 0, 0, 1, 1]


def test_other_text_can_be_evaluated(base, tmp_path):
    (tmp_path / "other.txt").write_bytes(b"ab" * 400)
    c = replace(base, tasks=("loss_by_position", "loss_by_kind"), path=str(tmp_path / "other.txt"), lengths=(LONG,))
    assert evaluate(c) == 0
    position, kinds = results_of(c)
    assert position["rows"] == 2  # of 801 tokens, with the boundary
    assert [part["kind"] for part in kinds["kinds"]] == [".txt"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"runs": ("nothing",)}, r"nothing is not a run directory: config.json is missing; train one"),
        (
            {"lengths": (LONG, 2 * LONG)},
            r"lengths: 768, but one was trained on rows of at most 384 tokens; use at most 384, or",
        ),
        (
            {"lengths": (100,)},
            r"lengths=100 must be a positive multiple of 2 \* \S+ \* mesh.context = 16.*; use 96 or 112",
        ),
        ({"tasks": ("where_thing",), "lengths": (128,)}, r"where_thing requires rows of more than \d+ tokens, not 128"),
        ({"mesh": config.Mesh(data=8, context=1)}, r"batch_size=2 must be a multiple of mesh.data = 8; use 8"),
        ({"strategy": "ulysses"}, r"one cannot be evaluated on this mesh .*kv_heads=2.*; choose another --mesh"),
        ({"mesh": config.Mesh(context=3)}, r"mesh .*context=3.* does not fit 8 devices"),
        ({"path": "nowhere"}, r"'nowhere' is neither a file nor a directory"),
        ({"lengths": (1024,), "longer": True}, r"no document of 1024 tokens, the longest has \d+; use --lengths of at"),
    ],
)
def test_a_mistake_is_one_message(base, change, message):
    with pytest.raises(ValueError, match=message):
        evaluate(replace(base, **change))
    assert not output_of(base).exists()


def test_a_missing_or_damaged_checkpoint_is_an_error(base):
    run = Path(base.runs[0])
    with pytest.raises(ValueError, match=r"one has no checkpoint 3; use one of 4"):
        evaluate(replace(base, runs=(str(run / "checkpoints" / "3"),)))
    assert evaluate(replace(base, runs=(str(run / "checkpoints"),), tasks=("needle",), samples=1)) == 0
    for path in (run / "checkpoints" / "4" / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"checkpoints/4 is damaged \(.*\); use another checkpoint"):
        evaluate(base)
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(
        ValueError, match=r"one has no checkpoint; train it with python scripts/train.py --config .*one/config.json"
    ):
        evaluate(base)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tasks": ("needel",)}, r"tasks: unknown 'needel': did you mean 'needle'\?"),
        ({"tasks": ("needle", "needle")}, "tasks=.* must be free of duplicates"),
        ({"depths": (0.0, 1.5)}, "depths=.* must be between 0 and 1 each"),
        ({"samples": 0}, "samples=0 must be from 1 to"),
        ({"lengths": (1,)}, "lengths=.* must be at least 2 each"),
    ],
)
def test_a_config_checks_itself(values, message):
    with pytest.raises(ValueError, match=message):
        config.Evaluation(**values)
