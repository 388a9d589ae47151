"""What the README shows runs as shown, and what it names is there."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ringattn import config

ROOT = Path(__file__).parents[1]
FENCES = re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
EXAMPLES = [text for language, text in FENCES if language == "python"]
COMMANDS = [line for language, text in FENCES if language == "bash" for line in text.splitlines()]


def tree() -> Iterator[Path]:
    """The files and folders of the README's tree: two spaces a level, the name first."""
    text = next(text for _, text in FENCES if text.startswith("ringattn/\n"))
    folders: list[Path] = []
    for line in text.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        path = Path(*folders[depth - 1 : depth], line.split()[0])
        folders[depth:] = [path]
        yield path


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_an_example_runs_as_shown(number, tmp_path):
    environ = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environ |= {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-W", "error", "-c", EXAMPLES[number]]
    done = subprocess.run(command, env=environ, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    shown = re.findall(r"^# prints (.*)$", EXAMPLES[number], re.M)
    assert shown
    assert done.stdout.splitlines()[: len(shown)] == shown


def test_all_commands_that_train_are_valid():
    commands = [shlex.split(line, comments=True) for line in COMMANDS if "scripts/train.py" in line]
    assert len(commands) > 5
    for words in commands:
        flags = words[words.index("--config") :]
        if not flags[1].startswith("runs/"):
            flags[1] = str(ROOT / flags[1])
            config.parse(flags, "")


def test_all_commands_that_measure_are_valid():
    commands = [shlex.split(line, comments=True) for line in COMMANDS if "scripts/benchmark.py" in line]
    assert len(commands) > 2
    for words in commands:
        flags = words[words.index("--config") :]
        flags[1] = str(ROOT / flags[1])
        config.parse(flags, "", config.Benchmark)


def test_all_commands_that_evaluate_are_valid():
    commands = [shlex.split(line, comments=True) for line in COMMANDS if "scripts/eval.py" in line]
    assert len(commands) > 2
    for words in commands:
        flags = words[words.index("--config") :]
        flags[1] = str(ROOT / flags[1])
        config.parse(flags, "", config.Evaluation)


def test_all_commands_that_plan_are_valid():
    commands = [shlex.split(line, comments=True) for line in COMMANDS if "scripts/plan.py" in line]
    assert len(commands) > 2
    for words in commands:
        flags = words[words.index("--config") :]
        for own in {"--topology", "--json"} & set(flags):
            at = flags.index(own)
            flags = flags[:at] + flags[at + 2 :]
        flags[1] = str(ROOT / flags[1])
        config.parse(flags, "")


def test_all_commands_that_prepare_are_valid():
    commands = [shlex.split(line, comments=True) for line in COMMANDS if "scripts/prepare.py" in line]
    assert commands
    for words in commands:
        flags = words[words.index("--config") :]
        output = flags.index("--output")
        flags[1] = str(ROOT / flags[1])
        config.parse(flags[:output] + flags[output + 2 :], "")


def test_all_configs_are_in_the_table():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for path in (ROOT / "configs").glob("*.py"):
        assert f"| [`{path.stem}`](configs/{path.name})" in text


def test_links_lead_somewhere():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    targets = [target for target in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in target]
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_the_tree_is_the_tree():
    named = list(tree())
    assert [path for path in named if not (ROOT / path).exists()] == []
    rooms = ("ringattn", "configs", "scripts")
    there = {path.relative_to(ROOT) for room in rooms for path in (ROOT / room).rglob("*.py")}
    missing = there - set(named)
    # A folder's own line stands for an __init__.py that only names what lies in it.
    assert {path for path in missing if path.name != "__init__.py" or path.parent not in named} == set()
