"""Every committed config is one that runs: it is read, fits its mesh, and says how it is started."""

from pathlib import Path

import pytest

from ringattn import config
from ringattn.mesh import check, resolve

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.py"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_fits_its_mesh(path, make_mesh):
    found = config.read(path)
    check(found, make_mesh(**resolve(found.mesh, found.mesh.simulate)))
    assert found.name == path.stem, "two configs with one name would share a folder"
    assert f"\n    python scripts/train.py --config configs/{path.name}\n" in path.read_text(encoding="utf-8")


def test_the_configs_show_the_range():
    """What an experiment may choose is chosen differently by two of them."""
    found = [config.read(path) for path in CONFIGS]
    assert {"ring", "gather"} == {each.attention.strategy for each in found}
    assert {"zigzag", "contiguous"} <= {each.attention.layout for each in found}
    assert {"float32", "bfloat16"} == {each.model.dtype for each in found}
    assert {True, False} == {each.model.tied for each in found}
    for name in ("data", "context", "tensor"):
        assert len({resolve(each.mesh, each.mesh.simulate)[name] for each in found}) > 1
    assert len({each.attention.window for each in found}) > 1
    assert len({each.data.seq_len for each in found}) > 1
    assert len({each.train.accumulate for each in found}) > 1
