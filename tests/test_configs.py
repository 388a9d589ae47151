"""Checks that every committed config loads, fits its mesh and has its command in its docstring."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from ringattn import config
from ringattn.config.stages import REPLACES
from ringattn.mesh.devices import check_divisible, resolve

ROOT = Path(__file__).parents[1]
ALL = sorted((ROOT / "configs").glob("*.py"))
BENCHMARKS = [path for path in ALL if "scripts/benchmark.py" in path.read_text(encoding="utf-8")]
PLANS = [path for path in ALL if "scripts/plan.py" in path.read_text(encoding="utf-8")]
EVALUATIONS = [path for path in ALL if path.stem.startswith("eval_")]
GENERATIONS = [path for path in ALL if "scripts/generate.py" in path.read_text(encoding="utf-8")]
CONFIGS = [path for path in ALL if path not in BENCHMARKS + PLANS + EVALUATIONS + GENERATIONS]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_fits_its_mesh(path, make_mesh):
    c = config.read(path)
    for stage in map(c.stage, range(1, len(c.stages) + 1)):
        check_divisible(stage, make_mesh(**resolve(stage.mesh, stage.mesh.simulate or 8)))
    assert c.name == path.stem, "configs with the same name would share a run directory"
    command = rf"\n    python scripts/train\.py --config configs/{re.escape(path.name)}( --data\.path \S+)?\n"
    assert re.search(command, path.read_text(encoding="utf-8"))


def test_configs_differ_in_every_field():
    """A field is justified only if two configs set it differently."""
    configs = [config.read(path) for path in CONFIGS + PLANS]
    assert {"ring", "gather", "usp", "auto"} == {c.attention.strategy for c in configs}
    assert {"zigzag", "contiguous"} <= {c.attention.layout for c in configs}
    assert {"float32", "bfloat16"} == {c.model.dtype for c in configs}
    assert {True, False} == {c.model.tied for c in configs} == {c.mesh.auto for c in configs}
    for name in (
        "layers",
        "vocabulary",
        "rope_theta",
        "rope_scaling",
        "rope_factor",
        "remat",
        "head_groups",
        "window",
        "family",
        "rope_local_theta",
    ):
        assert len({vars(c.model)[name] for c in configs}) > 1, name
    for name in ("data", "context_outer", "context", "tensor"):
        assert len({resolve(c.mesh, c.mesh.simulate or 64)[name] for c in configs}) > 1
    assert len({c.optimizer.offload for c in configs}) > 1
    assert len({c.optimizer.skip_spikes for c in configs}) > 1
    assert len({c.data.seq_len for c in configs}) > 1
    assert len({c.train.accumulate for c in configs}) > 1
    assert len({c.log.tensorboard for c in configs}) > 1
    assert len({c.log.wandb for c in configs}) > 1
    assert {"bytes", "dna", "video"} <= {c.data.tokenizer for c in configs}
    for name in ("path", "mixture", "overlap", "separate_documents", "frame_size", "validation"):
        assert len({vars(c.data)[name] for c in configs}) > 1, name
    for name in REPLACES:
        assert len({vars(stage)[name] for c in configs for stage in c.stages}) > 1, name


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_a_plan_loads(path):
    assert config.read(path).name == path.stem
    assert f"\n    python scripts/plan.py --config configs/{path.name} --topology " in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.stem)
def test_a_benchmark_loads(path):
    assert config.read(path, config.Benchmark).name == path.stem, "configs with the same name would share a directory"
    assert f"\n    python scripts/benchmark.py --config configs/{path.name}\n" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", EVALUATIONS, ids=lambda path: path.stem)
def test_an_evaluation_loads(path):
    c = config.read(path, config.Evaluation)
    assert c.name == path.stem, "configs with the same name would share a directory"
    assert f"\n    python scripts/eval.py --config configs/{path.name}\n" in path.read_text(encoding="utf-8")
    assert {Path(run).parts[0] for run in c.runs or ()} <= {"runs"}
    assert {Path(run).name for run in c.runs or ()} <= {config_path.stem for config_path in CONFIGS}


def test_evaluations_differ_in_every_field():
    configs = [config.read(path, config.Evaluation) for path in EVALUATIONS]
    for name in ("runs", "tasks", "lengths", "depths", "samples", "batch_size", "longer"):
        assert len({vars(c)[name] for c in configs}) > 1, name


def test_benchmarks_differ_in_every_field():
    configs = [config.read(path, config.Benchmark) for path in BENCHMARKS]
    for field in fields(config.Benchmark):
        if field.name != "directory":  # set by tests, and by users with another disk
            assert len({vars(c)[field.name] for c in configs}) > 1, field.name
    subjects = [config.parse_subject(text) for c in configs for text in c.subjects]
    for field in fields(config.Subject):
        assert len({vars(subject)[field.name] for subject in subjects}) > 1, field.name


@pytest.mark.parametrize("path", GENERATIONS, ids=lambda path: path.stem)
def test_a_config_of_generation_has_its_command(path):
    c = config.read(path, config.Generation)
    assert c.run is not None
    assert f"\n    python scripts/generate.py --config configs/{path.name} " in path.read_text(encoding="utf-8")
