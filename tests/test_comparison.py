"""Comparisons of two runs: differences of settings and of metrics, missing steps, plots."""

import json
import math

import pytest

from ringattn.runs.comparison import compare, plot, relative_difference, report

ROWS = [
    {"step": 1, "loss": 5.5, "grad_norm": 2.0, "learning_rate": 0.1, "tokens_per_second": 7.0, "stage": 1},
    {"step": 2, "loss": 5.0, "grad_norm": 1.0, "learning_rate": 0.2, "tokens_per_second": 9.0, "stage": 1},
    {"step": 2, "eval/loss": 5.25, "eval/accuracy": 0.5, "stage": 1},
    {"step": 3, "loss": None, "grad_norm": None, "learning_rate": None, "tokens_per_second": 9.0, "stage": 1},
    {"step": 4, "loss": 4.5, "grad_norm": 0.0, "learning_rate": 0.1, "tokens_per_second": 9.0, "stage": 1},
]


@pytest.fixture
def make_run(tmp_path):
    """make_run(name, rows, **sections): the directory of a run."""

    def make(name, rows, **sections):
        directory = tmp_path / name
        directory.mkdir()
        (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (directory / "config.json").write_text(json.dumps({"name": name, "train": {"seed": 0}} | sections))
        (directory / "environment.json").write_text(json.dumps({"packages": {"jax": "0.10.2"}, "cpus": 2}))
        return directory

    return make


def changed(step, **values):
    """ROWS with other values at the training row of a step."""
    return [row | values if row["step"] == step and "loss" in row else row for row in ROWS]


def test_equal_runs_differ_in_speed_and_settings_at_most(make_run):
    rows = [row | {"tokens_per_second": 1.0} for row in ROWS]
    c = compare(make_run("a", ROWS), make_run("b", rows, train={"seed": 1}), 0.0)
    assert c.equal
    assert c.config == {"name": ("a", "b"), "train.seed": (0, 1)}
    assert c.environment == {}
    assert {name: each.compared for name, each in c.metrics.items()} == {
        "loss": 4,
        "grad_norm": 4,
        "learning_rate": 4,
        "eval/loss": 1,
        "eval/accuracy": 1,
    }
    lines = report(c)
    assert lines[2:6] == ["config: different (A, B)", '  name: "a", "b"', "  train.seed: 0, 1", "environment: equal"]
    assert lines[-1] == "equal bit for bit"


def test_the_first_and_the_largest_difference(make_run):
    rows = changed(2, loss=math.nextafter(5.0, 6.0))
    rows[4] = rows[4] | {"loss": 4.5 * (1 + 1e-3), "grad_norm": 1e-30}
    a, b = make_run("a", ROWS), make_run("b", rows)
    c = compare(a, b, 1e-6)
    loss, grad_norm = c.metrics["loss"], c.metrics["grad_norm"]
    assert not c.equal
    assert (loss.first_different, loss.first_beyond, loss.largest_step) == (2, 4, 4)
    assert loss.largest == pytest.approx(1e-3, rel=1e-2)
    assert (grad_norm.first_different, grad_norm.largest) == (4, 1.0)
    assert c.metrics["learning_rate"].equal
    lines = report(c)
    assert lines[-1] == "different: loss at step 4"
    (line,) = (line for line in lines if line.startswith("loss "))
    assert line.split() == ["loss", "4", "step", "2", "step", "4", "0.000999", "at", "step", "4"]
    assert report(compare(a, b, 1.0))[-1] == "equal within a relative tolerance of 1"


def test_a_step_or_a_number_that_one_run_does_not_have_is_a_difference(make_run):
    a = make_run("a", ROWS)
    c = compare(a, make_run("b", [*ROWS[:2], *ROWS[3:]]), 1.0)
    assert not c.equal
    assert c.metrics["eval/loss"].missing == ((), (2,))
    assert report(c)[-3:] == [
        "missing in B: eval/loss of 1 steps, 2 to 2",
        "missing in B: eval/accuracy of 1 steps, 2 to 2",
        "different: steps are missing",
    ]
    c = compare(a, make_run("c", changed(3, loss=1.0)), 1.0)
    assert report(c)[-1] == "different: loss at step 3"
    assert relative_difference(None, None) == 0
    assert relative_difference(None, 1.0) == math.inf
    assert relative_difference(-1.0, 1.0) == 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metrics.jsonl", None, "b is not the directory of a run with metrics: .*metrics.jsonl is missing"),
        ("metrics.jsonl", "", "metrics.jsonl has no rows"),
        ("metrics.jsonl", '{"step": 1, "loss": "high"}\n', "line 1 of .* is not a row of metrics"),
        ("metrics.jsonl", '{"step": 1, "loss": 1' + "0" * 400 + "}\n", "line 1 of .* is not a row of metrics"),
        ("metrics.jsonl", '{"step": 1, "stage": 1}\n', "metrics.jsonl has no loss, grad_norm"),
        ("metrics.jsonl", "{}\n", "line 1 of .* is not a row of metrics"),
        ("config.json", None, "b is not a run directory: config.json is missing"),
        ("config.json", "[]", "config.json cannot be read .not a JSON object"),
        ("environment.json", "{", "environment.json cannot be read"),
    ],
)
def test_a_directory_that_is_not_of_a_run(make_run, name, content, message):
    a, b = make_run("a", ROWS), make_run("b", ROWS)
    (b / name).unlink()
    if content is not None:
        (b / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        compare(a, b, 0.0)


@pytest.mark.parametrize("tolerance", [-1.0, math.nan, math.inf])
def test_a_tolerance_that_is_not_a_number(make_run, tolerance):
    with pytest.raises(ValueError, match=r"--tolerance .* must be a number of at least 0"):
        compare(make_run("a", ROWS), make_run("b", ROWS), tolerance)


def test_a_plot_of_equal_and_of_different_runs(make_run, tmp_path):
    a, b = make_run("a", ROWS), make_run("b", changed(3, loss=1.0))
    for other in (a, b):
        plot(compare(a, other, 1e-5), tmp_path / "plot.png")
        assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
