"""The structure of the source: import directions, sizes, and what is not used."""

import ast
import re
import subprocess
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from ringattn.environment import git_commit

ROOT = Path(__file__).parents[1]
TOP = {"pyproject.toml", "README.md", "LICENSE", "CONTRIBUTING.md"}
TOP |= {"ringattn", "configs", "scripts", "tests", "notebooks"}

GROUND = {"compilation_cache", "environment", "hardware", "layout", "palette", "units"}
SHARED = GROUND | {"config", "mesh"}
ROOMS = {
    "__init__": {"attn", "flax", "layout"},
    "flax": {"attn"},
    "compilation_cache": set(),
    "environment": set(),
    "hardware": set(),
    "layout": set(),
    "palette": set(),
    "units": set(),
    "config": {"attn", "layout"},  # of attn only choices.py, which holds no arrays
    "mesh": {"compilation_cache", "config", "layout", "units"},
    "attn": {"compilation_cache", "hardware", "layout"},
    "runs": SHARED,
    "data": SHARED | {"runs"},
    "model": SHARED | {"attn", "data"},
    "cost": SHARED | {"attn", "data", "model"},
    "weights": SHARED | {"data", "model", "runs"},
    "training": SHARED | {"attn", "cost", "data", "generation", "model", "runs", "weights"},
    "generation": SHARED | {"attn", "data", "model", "runs", "weights"},
    "evaluation": SHARED | {"attn", "data", "generation", "model", "runs", "weights"},
    "planning": SHARED | {"attn", "cost", "data", "generation", "model", "runs", "training"},
    "benchmark": SHARED | {"attn", "cost", "data", "model", "planning", "runs"},
    "visualize": SHARED | {"attn", "cost"},
}
"""The other rooms of ringattn/ that each room may import."""
MANY_PARAMETERS = {"attention", "choose_strategy", "shard_attention", "flax_attention", "reference_attention"}
MANY_PARAMETERS |= {"generate", "load", "of"}  # of Generator
"""Public functions whose options are keyword arguments."""
FOREIGN = r"block_until_ready|block_count|set_blocking|BlockSpec|BlockSizes|block_(q|kv|k|size)\w*|(trim|lstrip)_blocks"
FOREIGN += r"|(threads|shared_memory|registers)_per_block\w*|block_dim_limit_\w"
"""Names of other libraries that contain "block", which our own names avoid because it is ambiguous."""

SOURCES = sorted((ROOT / "ringattn").rglob("*.py"))
OURS = SOURCES + sorted((ROOT / "scripts").glob("*.py")) + sorted((ROOT / "configs").glob("*.py"))


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def room(path: Path) -> str:
    """The first part below ringattn/: a directory, or a file without its ending."""
    return path.relative_to(ROOT / "ringattn").parts[0].removesuffix(".py")


def imported(path: Path) -> Iterator[str]:
    """Full names of everything that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name(path)}:{node.lineno} imports relatively"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def calls(path: Path) -> Iterator[tuple[str, int, int]]:
    """Name, number of arguments and line of each call of a plain name."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            yield node.func.id, len(node.args), node.lineno


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_imports_point_one_way(path):
    own = room(path)
    public = {each.split(".")[-1]: each.split(".")[1] for each in imported(ROOT / "ringattn" / "__init__.py")}
    ours = [each.split(".")[1] for each in imported(path) if each.startswith("ringattn.")]
    assert {public.get(each, each) for each in ours} <= ROOMS[own] | {own}
    if own == "config":
        attn = {each for each in imported(path) if each.startswith("ringattn.attn")}
        assert all(each.startswith("ringattn.attn.choices.") for each in attn), attn
    if own not in ("mesh", "attn", "config"):
        strings = [node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)]
        axes = {"context", "tensor"} & {text for text in strings if isinstance(text, str)}
        assert not axes, "mesh/axes.py names the axes"


def test_rooms_have_no_cycle():
    assert list(TopologicalSorter(ROOMS).static_order())  # raises CycleError


def test_configs_import_the_config_and_one_another_alone():
    neighbours = {path.stem for path in (ROOT / "configs").glob("*.py")}
    for path in (ROOT / "configs").glob("*.py"):
        for each in imported(path):
            assert each.startswith("ringattn.config") or each.split(".")[0] in {"dataclasses", *neighbours}, name(path)


@pytest.mark.parametrize("path", OURS, ids=name)
def test_files_and_functions_are_small(path):
    lines = len(path.read_text().splitlines())
    parts = path.relative_to(ROOT).parts
    attn = parts[1] == "attn" and parts[2] != "kernels"  # a fused kernel is one unit
    limit = {"scripts": 60, "configs": 40}.get(parts[0], 200 if attn else 300)
    assert lines <= limit
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            size = (node.end_lineno or 0) - node.lineno + 1
            assert size <= 50 or node.name in MANY_PARAMETERS, f"{node.name} has {size} lines"
            parameters = len(node.args.posonlyargs + node.args.args + node.args.kwonlyargs)
            assert parameters <= 8 or node.name in MANY_PARAMETERS, f"{node.name} has {parameters} parameters"


@pytest.mark.parametrize("path", OURS, ids=name)
def test_forbidden_names_and_imports(path):
    text = path.read_text()
    assert path.stem not in {"utils", "util", "helpers", "common", "manager", "factory", "misc"}
    for function, arguments, line in calls(path):
        assert function not in {"hasattr", "eval", "exec", "__import__"}, f"line {line}"
        assert function != "getattr" or arguments == 2, f"line {line}: getattr with a default"
    assert not {"pickle", "dill", "yaml"} & {each.split(".")[0] for each in imported(path)}
    found = re.search(r"(?i)block", re.sub(FOREIGN, "", text))
    line = text[: found.start()].count("\n") + 1 if found else 0
    assert found is None, f"line {line}: write tile, shard, layer or segment"
    assert not re.search(r"\bTODO\b|\bFIXME\b|\bXXX\b", text)


def test_the_top_level_has_no_other_entries():
    if git_commit() is None:
        pytest.skip("no git checkout")
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.check_output(command, cwd=ROOT, text=True)
    top = {line.split("/")[0] for line in listed.splitlines()}
    assert {each for each in top if not each.startswith(".")} <= TOP


def test_attention_is_a_function_and_attn_a_package():
    import ringattn
    import ringattn.attn.attention as module
    import ringattn.attn.mask

    assert ringattn.attention is module.attention
    assert ringattn.Mask is ringattn.attn.mask.Mask


def test_each_test_file_belongs_to_a_module():
    """Every test file is named after a module, or is one of those that cover several."""
    across = {
        "kernels",
        "equivalence",
        "laws",
        "meshes",
        "resume",
        "multiprocess",
        "scripts",
        "notebooks",
        "architecture",
    }
    across |= {"configs", "readme", "commands", "elastic", "support", "compile_once", "fuzz", "documents"}
    modules = {path.stem for path in SOURCES} | {room(path) for path in SOURCES}
    for path in (ROOT / "tests").glob("test_*.py"):
        assert path.stem.removeprefix("test_") in modules | across, name(path)
