"""Every committed config is one that runs: it is read, fits its mesh, and says how it is started."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from ringattn import config
from ringattn.config.stages import REPLACES
from ringattn.mesh import check, resolve

ROOT = Path(__file__).parents[1]
ALL = sorted((ROOT / "configs").glob("*.py"))
BENCHMARKS = [path for path in ALL if "scripts/benchmark.py" in path.read_text(encoding="utf-8")]
PLANS = [path for path in ALL if "scripts/plan.py" in path.read_text(encoding="utf-8")]
EVALUATIONS = [path for path in ALL if path.stem.startswith("eval_")]
CONFIGS = [path for path in ALL if path not in BENCHMARKS + PLANS + EVALUATIONS]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_fits_its_mesh(path, make_mesh):
    found = config.read(path)
    for stage in map(found.stage, range(1, len(found.stages) + 1)):
        check(stage, make_mesh(**resolve(stage.mesh, stage.mesh.simulate)))
    assert found.name == path.stem, "two configs with one name would share a folder"
    command = rf"\n    python scripts/train\.py --config configs/{re.escape(path.name)}( --data\.path \S+)?\n"
    assert re.search(command, path.read_text(encoding="utf-8"))


def test_the_configs_show_the_range():
    """What an experiment may choose is chosen differently by two of them."""
    found = [config.read(path) for path in CONFIGS + PLANS]
    assert {"ring", "gather", "usp"} == {each.attention.strategy for each in found}
    assert {"zigzag", "contiguous"} <= {each.attention.layout for each in found}
    assert {"float32", "bfloat16"} == {each.model.dtype for each in found}
    assert {True, False} == {each.model.tied for each in found}
    for name in ("layers", "vocabulary", "rope_theta", "rope_scaling", "rope_factor", "remat"):
        assert len({vars(each.model)[name] for each in found}) > 1, name
    for name in ("data", "context_outer", "context", "tensor"):
        assert len({resolve(each.mesh, each.mesh.simulate or 64)[name] for each in found}) > 1
    assert len({each.attention.window for each in found}) > 1
    assert len({each.data.seq_len for each in found}) > 1
    assert len({each.train.accumulate for each in found}) > 1
    assert len({each.log.tensorboard for each in found}) > 1
    assert len({each.log.wandb for each in found}) > 1
    assert {"bytes", "dna", "video"} <= {each.data.tokenizer for each in found}
    for name in ("path", "mixture", "overlap", "frame_size", "validation"):
        assert len({vars(each.data)[name] for each in found}) > 1, name
    for name in REPLACES:
        assert len({vars(stage)[name] for each in found for stage in each.stages}) > 1, name


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_a_plan_is_read(path):
    assert config.read(path).name == path.stem
    assert f"\n    python scripts/plan.py --config configs/{path.name} --topology " in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.stem)
def test_a_benchmark_is_read(path):
    assert config.read(path, config.Benchmark).name == path.stem, "two configs with one name would share a folder"
    assert f"\n    python scripts/benchmark.py --config configs/{path.name}\n" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", EVALUATIONS, ids=lambda path: path.stem)
def test_an_evaluation_is_read(path):
    found = config.read(path, config.Evaluation)
    assert found.name == path.stem, "two configs with one name would share a folder"
    assert f"\n    python scripts/eval.py --config configs/{path.name}\n" in path.read_text(encoding="utf-8")
    assert {Path(run).parts[0] for run in found.runs} == {"runs"}
    assert {Path(run).name for run in found.runs} <= {each.stem for each in CONFIGS}


def test_the_evaluations_show_the_range():
    found = [config.read(path, config.Evaluation) for path in EVALUATIONS]
    for name in ("runs", "tasks", "lengths", "depths", "samples", "batch_size", "longer"):
        assert len({vars(each)[name] for each in found}) > 1, name


def test_the_benchmarks_show_the_range():
    found = [config.read(path, config.Benchmark) for path in BENCHMARKS]
    for field in fields(config.Benchmark):
        if field.name != "directory":  # so that it can be elsewhere
            assert len({vars(each)[field.name] for each in found}) > 1, field.name
    subjects = [config.parse_subject(text) for each in found for text in each.subjects]
    for field in fields(config.Subject):
        assert len({vars(each)[field.name] for each in subjects}) > 1, field.name
