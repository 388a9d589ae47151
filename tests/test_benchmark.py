"""All subjects compute the same attention; results, table and plot are complete."""

import json
import os
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
from matplotlib.figure import Figure
from matplotlib.image import imread

from ringattn import config, unpermute
from ringattn.attn.mask import Mask
from ringattn.attn.reference import reference_attention
from ringattn.benchmark import benchmark, measure, report, subjects, timing
from ringattn.mesh.devices import ring_mesh
from ringattn.runs.lock import locked

SUBJECTS = (
    "ring zigzag",
    "ring striped window=9 documents=3",
    "gather zigzag documents=2",
    "ulysses contiguous window=5",
    "dense",
    "ringattention documents=3",
)


def reference(subject: config.Subject, inputs: subjects.Inputs):
    """Output and gradients of query, key and value in float64, in natural order."""
    mask = Mask(causal=True, window=None if subject.window is None else (subject.window, 0))
    query, key, value, d_out = (np.asarray(x, np.float64) for x in inputs[:4])
    with jax.enable_x64(True):
        ids = None if inputs.segment_ids is None else jnp.asarray(inputs.segment_ids)

        def attend(query, key, value):
            return reference_attention(query, key, value, mask=mask, segment_ids=ids)

        out, pull = jax.vjp(attend, *map(jnp.asarray, (query, key, value)))
        return jax.tree.map(np.asarray, (out, *pull(jnp.asarray(d_out))))


@pytest.mark.parametrize("text", SUBJECTS)
def test_a_subject_computes_attention(text):
    subject = config.parse_subject(text)
    if subject.method == "ringattention" and find_spec("ringattention") is None:
        pytest.skip("ringattention is not installed")
    kv_heads = 4 if subject.method == "ringattention" else 2
    case = subjects.Case(length=64, shards=2, heads=4, kv_heads=kv_heads, head_dim=8, dtype="float32")
    mesh = ring_mesh(case.shards)
    inputs = subjects.place_inputs(subject, case, mesh)
    # ringattention needs the default promotion of JAX.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        attend = subjects.make_attend(subject, mesh)
        with jax.set_mesh(mesh) if subject.method != "dense" else nullcontext():
            out, gradients = jax.jit(subjects.make_pass("forward+backward", attend))(inputs)
    expected = reference(subject, subjects.draw_inputs(case, subject.documents))
    for array, exact in zip((out, *gradients), expected, strict=True):
        natural = unpermute(np.asarray(array), subject.layout, case.shards)
        assert np.linalg.norm(natural - exact) <= 1e-6 * np.linalg.norm(exact)


def test_useful_flops_count_visible_pairs():
    case = subjects.Case(length=50, shards=1, heads=3, kv_heads=3, head_dim=8, dtype="float32")
    for text in ("dense", "ring zigzag window=0", "ring zigzag window=7", "ring zigzag window=9 documents=7"):
        subject = config.parse_subject(text)
        ids = np.arange(50) * subject.documents // 50
        distance = np.arange(50)[:, None] - np.arange(50)
        left = 50 if subject.window is None else subject.window
        pairs = ((distance >= 0) & (distance <= left) & (ids[:, None] == ids)).sum()
        assert subjects.useful_flops(subject, case, "forward") == pairs * 3 * 2 * 2 * 8
        assert subjects.useful_flops(subject, case, "forward+backward") == 3 * pairs * 3 * 2 * 2 * 8


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
    """Directory and results of a small benchmark, which replaced the results of an earlier run."""
    c = replace(SMALL, directory=str(tmp_path_factory.mktemp("runs")))
    directory = measure.prepare_directory(c)
    (directory / "results.json").write_text("results of an earlier run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "SAMPLE_SECONDS", 1e-3)
        assert benchmark(c) == 0
    assert config.load(directory / "config.json", config.Benchmark) == c
    results = json.loads((directory / "results.json").read_text())
    assert results["config"] == json.loads((directory / "config.json").read_text())
    return directory, results


def test_the_results_are_complete(finished):
    directory, results = finished
    assert sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()) == [
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
        assert len(row["samples"]) == timing.MIN_ROUNDS
        assert row["seconds"] == sorted(row["samples"])[1]
        assert row["temp_bytes"] >= 0
        parsed, case = config.parse_subject(subject), subjects.Case(size * tokens, size, 3, 1, 8, "float32")
        assert row["flops_per_second"] == subjects.useful_flops(parsed, case, pass_) / row["seconds"]
        for baseline, speed in row["speed"].items():
            other = rows[size, tokens, pass_, baseline]["samples"]
            ratios = sorted(a / b for a, b in zip(other, row["samples"], strict=True))
            assert speed["median"] == pytest.approx(ratios[1])
            assert ratios[0] <= speed["low"] <= speed["median"] <= speed["high"] <= ratios[2]


def test_a_subject_that_cannot_run_is_reported_and_skipped(finished):
    for row in finished[1]["rows"]:
        if row["subject"] == "ulysses contiguous" and row["ring"] == 2:
            assert "does not split over" in row["skipped"] or "heads" in row["skipped"]
        elif row["subject"] == "ringattention":
            assert "ringattention" in row["skipped"]
        else:
            assert row["skipped"] is None
            baselines = {"dense"} if row["ring"] == 2 else {"dense", "ulysses contiguous"}
            assert row["speed"].keys() == baselines
    lines = report.skipped([row for row in finished[1]["rows"] if row["ring"] == 2 and row["shard_tokens"] == 16])
    assert [line.split(":")[0] for line in lines] == [
        "skipped ulysses contiguous, forward and forward+backward",
        "skipped ringattention, forward and forward+backward",
    ]


def test_the_plot_shows_lengths_and_rings(finished, tmp_path):
    directory, results = finished
    both = imread(directory / "plots" / "benchmark.png").shape
    report.plot([row for row in results["rows"] if row["ring"] == 1], "by length", tmp_path / "plots" / "length.png")
    report.plot(
        [row for row in results["rows"] if row["shard_tokens"] == 16], "by ring", tmp_path / "plots" / "ring.png"
    )
    one = imread(tmp_path / "plots" / "length.png").shape
    assert one == imread(tmp_path / "plots" / "ring.png").shape
    assert one[1] == both[1]
    assert one[0] < 0.7 * both[0]


def test_the_legend_has_only_measured_subjects(finished, tmp_path, monkeypatch):
    names = []
    monkeypatch.setattr(Figure, "legend", lambda self, handles, labels, **_: names.extend(labels))
    report.plot([row for row in finished[1]["rows"] if row["ring"] == 2], "a ring of 2", tmp_path / "plots" / "2.png")
    assert names == ["gather contiguous", "dense"], "ulysses and ringattention were skipped"


def test_the_legend_has_only_subjects_of_the_plotted_rings_and_lengths(finished, tmp_path, monkeypatch):
    """Ulysses runs on a ring of 1 with few tokens. The plots show the ring of 2 and the most tokens."""
    names = []
    monkeypatch.setattr(Figure, "legend", lambda self, handles, labels, **_: names.extend(labels))
    most = max(row["shard_tokens"] for row in finished[1]["rows"])
    rows = [row for row in finished[1]["rows"] if "ulysses" not in row["subject"] or row["shard_tokens"] < most]
    assert any("ulysses" in row["subject"] and row["skipped"] is None for row in rows)
    report.plot(rows, "both", tmp_path / "plots" / "both.png")
    assert names == ["gather contiguous", "dense"]


def test_a_program_that_does_not_fit_memory_is_not_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(timing, "free_memory", lambda device: 1000)
    small = {"rings": (2,), "shard_tokens": (16,), "subjects": ("gather contiguous", "dense"), "baselines": ("dense",)}
    assert benchmark(config.Benchmark(directory=str(tmp_path), seconds=0, **small)) == 0
    output = capsys.readouterr().out
    for subject in small["subjects"]:
        assert f"skipped {subject}, forward and forward+backward: needs 0.0 GiB, more than 50% of" in output
    rows = json.loads((tmp_path / "benchmark" / "results.json").read_text())["rows"]
    assert [row["skipped"][:5] for row in rows] == ["needs"] * 4


def test_a_missing_package_is_reported_with_a_fix(monkeypatch):
    monkeypatch.setattr(sys, "path", [])
    for name in [name for name in sys.modules if name.partition(".")[0] == "ringattention"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ModuleNotFoundError, match=r"not installed: pip install -e '\.\[benchmark\]'"):
        subjects.make_attend(config.parse_subject("ringattention"), ring_mesh(2))


def test_the_fix_for_a_missing_package_is_printed_in_full(tmp_path, monkeypatch, capsys):
    """rich's markup would remove the brackets and what is between them."""
    fix = "the package ringattention is not installed: pip install -e '.[benchmark]'"

    def fail(subject, mesh):
        raise ModuleNotFoundError(fix)

    monkeypatch.setattr(measure, "make_attend", fail)
    directory = str(tmp_path / "[runs]")
    c = config.Benchmark(directory=directory, rings=(1,), shard_tokens=(16,), subjects=("dense",), seconds=0)
    assert benchmark(c) == 0
    output = capsys.readouterr().out
    assert f"skipped dense, forward and forward+backward: {fix}" in output
    assert f"writing results to {directory}" in output


@dataclass(frozen=True)
class Fake(timing.Program):
    """A program that records its calls."""

    name: str
    called: list

    @property
    def temp_bytes(self):
        return timing.LARGE_BYTES if self.name == "large" else 0

    def seconds(self, calls):
        self.called.append((self.name, calls))
        return float(calls)


def test_every_round_times_every_program_once_in_a_new_order():
    called = []
    anything: Any = None
    calls = {"a": 1, "b": 3, "c": 1, "large": 1}
    programs = {name: (Fake(anything, None, name, called), count) for name, count in calls.items()}
    times = list(timing.rounds(programs, 0))
    assert times == [calls] * timing.MIN_ROUNDS
    orders = [tuple(round_times) for round_times in times]
    assert len(set(orders)) > 1
    expected, previous = [], None
    for name in chain(*orders):
        untimed = name == "b" or previous == "large"  # short calls, or the program after a large one
        expected += [(name, 1)] * untimed + [(name, calls[name])]
        previous = name
    assert called == expected


def test_a_ring_that_does_not_fit_is_refused_with_a_fix():
    with pytest.raises(ValueError, match=r"rings=\(2, 16\) do not fit 8 devices; use --rings 2, or --simulate 16"):
        measure.ring_sizes(config.Benchmark(rings=(2, 16)))
    assert measure.ring_sizes(config.Benchmark(rings=(-1, 2, 8))) == [8, 2]


def test_a_directory_in_use_is_refused(tmp_path):
    directory = tmp_path / SMALL.name
    with locked(directory / ".lock", directory, "", ""):
        in_use = rf"^{directory} is in use by process {os.getpid()} on .* or use another --name$"
        with pytest.raises(ValueError, match=in_use):
            benchmark(replace(SMALL, directory=str(tmp_path)))
        assert [path.name for path in directory.iterdir()] == [".lock"]


def test_a_directory_of_another_kind_of_run_is_not_overwritten(tmp_path):
    directory = tmp_path / "mine"
    directory.mkdir()
    (directory / "config.json").write_text(config.to_json(config.Config()))
    with pytest.raises(ValueError, match=r"defines a Config for scripts/train.py.*use another --name"):
        measure.prepare_directory(config.Benchmark(name="mine", directory=str(tmp_path)))
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot write to .*use another --directory"):
        measure.prepare_directory(config.Benchmark(directory=str(tmp_path / "file")))
