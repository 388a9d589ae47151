"""What is timed is the same attention everywhere, and what comes of it is kept entire."""

import json
import sys
from contextlib import nullcontext
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import chain
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.image import imread

from ringattn import config, unpermute
from ringattn.attention import Mask
from ringattn.attention.dense import dense_attention
from ringattn.benchmark import benchmark, report, run, subjects, timing
from ringattn.mesh import ring

SUBJECTS = (
    "ring zigzag",
    "ring striped window=9 documents=3",
    "gather zigzag documents=2",
    "ulysses contiguous window=5",
    "dense",
    "ringattention documents=3",
)


def oracle(subject: config.Subject, inputs: subjects.Inputs):
    """Output and gradients of query, key and value in float64, natural order."""
    mask = Mask(causal=True, window=None if subject.window is None else (subject.window, 0))
    query, key, value, d_out = (np.asarray(x, np.float64) for x in inputs[:4])
    with jax.enable_x64(True):
        ids = None if inputs.segment_ids is None else jnp.asarray(inputs.segment_ids)

        def attend(query, key, value):
            return dense_attention(query, key, value, mask=mask, segment_ids=ids)

        out, pull = jax.vjp(attend, *map(jnp.asarray, (query, key, value)))
        return jax.tree.map(np.asarray, (out, *pull(jnp.asarray(d_out))))


@pytest.mark.parametrize("text", SUBJECTS)
def test_a_subject_is_attention(text):
    subject = config.parse_subject(text)
    if subject.method == "ringattention" and find_spec("ringattention") is None:
        pytest.skip("ringattention is not installed")
    kv_heads = 4 if subject.method == "ringattention" else 2
    case = subjects.Case(length=64, shards=2, heads=4, kv_heads=kv_heads, head_dim=8, dtype="float32")
    mesh = ring(case.shards)
    inputs = subjects.placed_inputs(subject, case, mesh)
    # The package promotes as JAX does by default.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        attend = subjects.make_attend(subject, mesh)
        with jax.set_mesh(mesh) if subject.method != "dense" else nullcontext():
            out, gradients = jax.jit(subjects.make_pass("forward+backward", attend))(inputs)
    expected = oracle(subject, subjects.draw(case, subject.documents))
    for found, exact in zip((out, *gradients), expected, strict=True):
        found = unpermute(np.asarray(found), subject.layout, case.shards)
        assert np.linalg.norm(found - exact) <= 1e-6 * np.linalg.norm(exact)


def test_the_useful_work_is_that_of_pairs_that_see_each_other():
    case = subjects.Case(length=50, shards=1, heads=3, kv_heads=3, head_dim=8, dtype="float32")
    for text in ("dense", "ring zigzag window=0", "ring zigzag window=7", "ring zigzag window=9 documents=7"):
        subject = config.parse_subject(text)
        ids = np.arange(50) * subject.documents // 50
        apart = np.arange(50)[:, None] - np.arange(50)
        left = 50 if subject.window is None else subject.window
        seen = ((apart >= 0) & (apart <= left) & (ids[:, None] == ids)).sum()
        assert subjects.useful_flops(subject, case, "forward") == seen * 3 * 2 * 2 * 8
        assert subjects.useful_flops(subject, case, "forward+backward") == 3 * seen * 3 * 2 * 2 * 8


SMALL = config.Benchmark(
    rings=(1, 2),
    shard_tokens=(16, 32),
    subjects=("gather contiguous", "dense", "ulysses contiguous", "ringattention"),
    baselines=("ulysses contiguous", "dense"),
    heads=3,
    kv_heads=1,
    head_dim=8,
    seconds=0,
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder and the results of a small benchmark, that ran where a longer one had been before."""
    directory = str(tmp_path_factory.mktemp("runs"))
    c = replace(SMALL, directory=directory)
    folder = run.prepare_folder(c)
    (folder / "results.json").write_text("those of an earlier run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "SAMPLE", 1e-3)
        assert benchmark(c) == 0
    assert config.load(folder / "config.json", config.Benchmark) == c
    results = json.loads((folder / "results.json").read_text())
    assert results["config"] == json.loads((folder / "config.json").read_text())
    return folder, results


def test_the_results_are_complete(finished):
    folder, results = finished
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()) == [
        "config.json",
        "plots/benchmark.png",
        "results.json",
    ]
    assert results["environment"]["devices"]["count"] == 8
    rows = {(row["ring"], row["shard_tokens"], row["pass"], row["subject"]): row for row in results["rows"]}
    assert len(rows) == len(results["rows"]) == 2 * 2 * 2 * 4
    for (size, tokens, pass_, subject), row in rows.items():
        assert row["length"] == size * tokens
        if row["skipped"] is not None:
            continue
        assert len(row["samples"]) == timing.ROUNDS
        assert row["seconds"] == sorted(row["samples"])[1]
        assert row["temp_bytes"] >= 0
        parsed, case = config.parse_subject(subject), subjects.Case(size * tokens, size, 3, 1, 8, "float32")
        assert row["flops_per_second"] == subjects.useful_flops(parsed, case, pass_) / row["seconds"]
        for baseline, speed in row["speed"].items():
            other = rows[size, tokens, pass_, baseline]["samples"]
            ratios = sorted(a / b for a, b in zip(other, row["samples"], strict=True))
            assert speed["median"] == pytest.approx(ratios[1])
            assert ratios[0] <= speed["low"] <= speed["median"] <= speed["high"] <= ratios[2]


def test_what_cannot_run_is_told_and_left_out(finished):
    for row in finished[1]["rows"]:
        if row["subject"] == "ulysses contiguous" and row["ring"] == 2:
            assert "does not split over" in row["skipped"] or "heads" in row["skipped"]
        elif row["subject"] == "ringattention":
            assert "ringattention" in row["skipped"]
        else:
            assert row["skipped"] is None
            there = {"dense"} if row["ring"] == 2 else {"dense", "ulysses contiguous"}
            assert row["speed"].keys() == there
    told = report.skipped([row for row in finished[1]["rows"] if row["ring"] == 2 and row["shard_tokens"] == 16])
    assert [line.split(":")[0] for line in told] == [
        "skipped ulysses contiguous, forward and forward+backward",
        "skipped ringattention, forward and forward+backward",
    ]


def test_the_plot_shows_lengths_and_rings(finished, tmp_path):
    folder, results = finished
    whole = imread(folder / "plots" / "benchmark.png").shape
    report.plot([row for row in results["rows"] if row["ring"] == 1], "by length", tmp_path / "plots" / "length.png")
    report.plot(
        [row for row in results["rows"] if row["shard_tokens"] == 16], "by ring", tmp_path / "plots" / "ring.png"
    )
    half = imread(tmp_path / "plots" / "length.png").shape
    assert half == imread(tmp_path / "plots" / "ring.png").shape
    assert half[1] == whole[1]
    assert half[0] < 0.7 * whole[0]


def test_what_does_not_fit_memory_is_not_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(timing, "free_bytes", lambda device: 1000)
    small = {"rings": (2,), "shard_tokens": (16,), "subjects": ("gather contiguous", "dense"), "baselines": ("dense",)}
    assert benchmark(config.Benchmark(directory=str(tmp_path), seconds=0, **small)) == 0
    said = capsys.readouterr().out
    for subject in small["subjects"]:
        assert f"skipped {subject}, forward and forward+backward: it needs 0.0 GiB, more than 50% of" in said
    rows = json.loads((tmp_path / "benchmark" / "results.json").read_text())["rows"]
    assert [row["skipped"][:8] for row in rows] == ["it needs"] * 4


def test_a_package_that_is_not_there_is_told_with_a_cure(monkeypatch):
    monkeypatch.setattr(sys, "path", [])
    for name in [name for name in sys.modules if name.partition(".")[0] == "ringattention"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ModuleNotFoundError, match=r"not installed: pip install -e '\.\[benchmark\]'"):
        subjects.make_attend(config.parse_subject("ringattention"), ring(2))


@dataclass(frozen=True)
class Fake(timing.Program):
    """In the place of a program; notes who is called."""

    name: str
    called: list

    @property
    def temp_bytes(self):
        return timing.LARGE if self.name == "large" else 0

    def seconds(self, calls):
        self.called.append((self.name, calls))
        return float(calls)


def test_every_round_runs_every_program_once_in_an_order_of_its_own():
    called = []
    anything: Any = None
    calls = {"a": 1, "b": 3, "c": 1, "large": 1}
    programs = {name: (Fake(anything, None, name, called), count) for name, count in calls.items()}
    found = list(timing.rounds(programs, 0))
    assert found == [calls] * timing.ROUNDS
    orders = [tuple(each) for each in found]
    assert len(set(orders)) > 1
    expected, before = [], None
    for name in chain(*orders):
        untimed = name == "b" or before == "large"  # a short call, or one that finds its memory taken
        expected += [(name, 1)] * untimed + [(name, calls[name])]
        before = name
    assert called == expected


def test_a_ring_that_does_not_fit_is_refused_with_a_cure():
    with pytest.raises(ValueError, match=r"rings=\(2, 16\) do not fit 8 devices: use --rings 2, or --simulate 16"):
        run.ring_sizes(config.Benchmark(rings=(2, 16)))
    assert run.ring_sizes(config.Benchmark(rings=(-1, 2, 8))) == [8, 2]


def test_a_folder_of_another_kind_of_run_is_left_alone(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    config.save(config.Config(), folder / "config.json")
    with pytest.raises(ValueError, match=r"holds a Config, for scripts/train.py.*choose another --name"):
        run.prepare_folder(config.Benchmark(name="mine", directory=str(tmp_path)))
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot write to .*choose another --directory"):
        run.prepare_folder(config.Benchmark(directory=str(tmp_path / "file")))
