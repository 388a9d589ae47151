"""Tests that the READMEs and CONTRIBUTING.md are right: examples, commands, links, tables, rendered docstrings."""

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import FAST_COMPILATION

from ringattn import config
from ringattn.runs import local

ROOT = Path(__file__).parents[1]
FRONT, CONTRIBUTING = ROOT / "README.md", ROOT / "CONTRIBUTING.md"
ROOMS = ("training", "data", "evaluation", "weights", "generation", "planning", "benchmark", "visualize", "attn")
"""In the order in which their commands must run: evaluation reads the runs of training and data."""
READMES = [FRONT, *(ROOT / "ringattn" / room / "README.md" for room in ROOMS)]
FRONT_LINES = 220


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def fences(path: Path) -> list[tuple[str, str]]:
    """(language, text) of every fenced code listing."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", read(path), re.M | re.S)


def prose(path: Path) -> str:
    """The text without code listings."""
    return re.sub(r"^```.*?^```$", "", read(path), flags=re.M | re.S)


def commands(*paths: Path) -> list[tuple[str, ...]]:
    """The words of every command in the bash listings, in order, each command once."""
    listings = [text for path in paths for language, text in fences(path) if language == "bash"]
    lines = [line for text in listings for line in text.replace("\\\n", "").splitlines()]
    parts = [part for line in lines for part in line.split("&&")]
    return [words for words in dict.fromkeys(tuple(shlex.split(part, comments=True)) for part in parts) if words]


EXAMPLES = {
    f"{path.parent.name if path != FRONT else 'front'}-{number}": text
    for path in READMES
    for number, text in enumerate(text for language, text in fences(path) if language == "python")
}
COMMANDS = commands(*READMES)
SIMULATE = re.compile(r"^jax\.config\.update\(\"jax_num_cpu_devices\", 8\).*\n", re.M)


def flags_of(script: str) -> list[list[str]]:
    """The flags of each command that runs `script` with a committed config, which is named by its absolute path."""
    found = [list(words) for words in COMMANDS if script in words]
    flags = [words[words.index("--config") :] for words in found]
    return [["--config", str(ROOT / path), *rest] for _, path, *rest in flags if not path.startswith("runs/")]


def parse_as(script: str, flags: list[str]) -> None:
    """Parses flags like a script that has its own options."""
    spec = importlib.util.spec_from_file_location(Path(script).stem, ROOT / script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, spec.name, module)  # the parser reads the source of the Options for their docstrings
        spec.loader.exec_module(module)
        config.parse_with(module.Options, flags, "", sections=module.SECTIONS)


def run_python(code: str, directory: Path) -> str:
    """Runs code in a separate process with warnings as errors; returns its output."""
    environ = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": FAST_COMPILATION}
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, env=environ, cwd=directory, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_guide_is_tested():
    assert set(READMES[1:]) == set((ROOT / "ringattn").rglob("README.md"))


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs_as_shown(name, tmp_path):
    shown = re.findall(r"^# prints (.*)$", EXAMPLES[name], re.M)
    assert shown
    assert run_python(EXAMPLES[name], tmp_path).splitlines()[: len(shown)] == shown


@pytest.mark.slow
def test_all_examples_run_on_one_device(tmp_path):
    assert sum(len(SIMULATE.findall(text)) for text in EXAMPLES.values()) > 5
    scripts = [SIMULATE.sub("", text) for text in EXAMPLES.values()]
    lines = [f"exec({text!r}, {{'__name__': 'example'}})" for text in scripts]
    run_python("\n".join([*lines, "import jax", "assert jax.device_count() == 1"]), tmp_path)


def test_all_training_commands_are_valid():
    assert len(flags_of("scripts/train.py")) > 5
    for flags in flags_of("scripts/train.py"):
        config.parse_with(local.Options, flags, "")


def test_all_benchmark_commands_are_valid():
    assert len(flags_of("scripts/benchmark.py")) > 2
    for flags in flags_of("scripts/benchmark.py"):
        config.parse(flags, "", config.Benchmark)


def test_all_evaluation_commands_are_valid():
    assert len(flags_of("scripts/eval.py")) > 2
    for flags in flags_of("scripts/eval.py"):
        config.parse(flags, "", config.Evaluation)


def test_all_planning_commands_are_valid():
    assert len(flags_of("scripts/plan.py")) > 2
    for flags in flags_of("scripts/plan.py"):
        parse_as("scripts/plan.py", flags)


def test_all_preparation_commands_are_valid():
    assert flags_of("scripts/prepare.py")
    for flags in flags_of("scripts/prepare.py"):
        parse_as("scripts/prepare.py", flags)


def test_every_config_is_in_a_table():
    rows = [line for path in READMES for line in read(path).splitlines()]
    for path in (ROOT / "configs").glob("*.py"):
        assert any(row.startswith(f"| [`{path.stem}`](../../configs/{path.name}) |") for row in rows), path.name


@pytest.mark.parametrize("path", [*READMES, CONTRIBUTING], ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    pairs = re.findall(r"\]\(([^)]+)\)|<img src=\"([^\"]+)\"", prose(path))
    targets = [target for pair in pairs for target in pair if target and "://" not in target]
    assert targets
    for target in targets:
        file, _, anchor = target.partition("#")
        linked = path.parent / file if file else path
        assert linked.exists(), target
        headings = re.findall(r"^##+ (.*)$", prose(linked), re.M) if anchor else []
        assert not anchor or anchor in [re.sub(r"[^\w -]", "", each).lower().replace(" ", "-") for each in headings]


def test_the_front_page_is_short():
    assert len(read(FRONT).splitlines()) <= FRONT_LINES


def test_the_first_screen_has_the_first_command():
    """Title, description, commands and animation precede the first heading; lines as on a screen of 80 columns."""
    first = read(FRONT).split("\n## ")[0]
    until = first.split("python scripts/train.py --config configs/quickstart.py")[0]
    assert sum(1 + len(line) // 80 for line in until.splitlines()) < 16
    assert "ring_animated.svg" in first


def test_the_comparison_is_an_extract_of_the_whole_table():
    """Same words in the same columns; on the front page they have no links to sources."""
    guide = read(ROOT / "ringattn" / "attn" / "README.md")
    whole = re.sub(r"\[([\w?]+)\]\[[^\]]+\]", r"\1", guide).splitlines()
    table = re.search(r"^\| \| ringattn \|.*\n\|[-|]+\|\n((?:\|.*\n)+)", read(FRONT), re.M)
    assert table
    rows = table[1].splitlines()
    assert 6 <= len(rows) <= 8
    assert [row for row in rows if row not in whole] == []


def test_the_docs_render(tmp_path):
    (command,) = [words for words in commands(CONTRIBUTING) if "pdoc" in words]
    # Orbax's StandardSave, a base class of ours, has an annotation that only Orbax's own module can resolve.
    foreign = "ignore:Error parsing type annotation tree_types.JsonType:UserWarning"
    words = [sys.executable, "-W", "error::UserWarning", "-W", foreign, *command[1:]]
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    page = read(tmp_path / "site" / "ringattn.html")
    assert {f'id="{name}"' for name in ("attention", "arguments", "returns", "raises")} <= set(
        re.findall(r'id="[a-z]+"', page)
    )
    for module in (path.parent for path in (ROOT / "ringattn").glob("*/__init__.py")):
        page = read(tmp_path / "site" / "ringattn" / f"{module.name}.html")
        if module.name in ROOMS:
            title = read(module / "README.md").splitlines()[0].removeprefix("# ")
            assert title in page, "its docstring includes its guide"


def tree() -> Iterator[Path]:
    """The files and directories of CONTRIBUTING.md's tree: two spaces per level, the name first."""
    text = next(text for _, text in fences(CONTRIBUTING) if text.startswith("ringattn/\n"))
    directories: list[Path] = []
    for line in text.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        path = Path(*directories[depth - 1 : depth], line.split()[0])
        directories[depth:] = [path]
        yield path


def test_the_tree_is_the_repository():
    named = list(tree())
    assert [path for path in named if not (ROOT / path).exists()] == []
    present = {path.relative_to(ROOT) for room in ("ringattn", "scripts") for path in (ROOT / room).rglob("*.py")}
    missing = present - set(named)
    # The line of a directory stands for its __init__.py.
    assert {path for path in missing if path.name != "__init__.py" or path.parent not in named} == set()
