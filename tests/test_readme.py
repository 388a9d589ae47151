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
    targets = re.findall(r"\]\(([^)]+)\)|<img src=\"([^\"]+)\"", text)
    here = [target for pair in targets for target in pair if target and "://" not in target]
    assert len(here) > 10
    headings = re.findall(r"^## (.*)$", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S), re.M)
    anchors = {"#" + re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
    assert [target for target in here if target not in anchors and not (ROOT / target).exists()] == []


def test_the_first_screen_has_the_first_command():
    """Title, what it is, the commands and the animation, before the first heading; lines as a screen of 80 columns."""
    first = (ROOT / "README.md").read_text(encoding="utf-8").split("\n## ")[0]
    until = first.split("python scripts/train.py --config configs/quickstart.py")[0]
    assert sum(1 + len(line) // 80 for line in until.splitlines()) < 16
    assert "ring_animated.svg" in first


def test_the_docs_render(tmp_path):
    command = next(line for line in COMMANDS if "-m pdoc" in line).split("&& ")[-1]
    words = [sys.executable, "-W", "error::UserWarning", *shlex.split(command)[1:]]
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    page = (tmp_path / "site" / "ringattn.html").read_text(encoding="utf-8")
    assert {f'id="{name}"' for name in ("attention", "arguments", "returns", "raises")} <= set(
        re.findall(r'id="[a-z]+"', page)
    )
    for module in (path.parent for path in (ROOT / "ringattn").glob("*/__init__.py")):
        assert (tmp_path / "site" / "ringattn" / f"{module.name}.html").exists()


def test_the_tree_is_the_tree():
    named = list(tree())
    assert [path for path in named if not (ROOT / path).exists()] == []
    rooms = ("ringattn", "configs", "scripts")
    there = {path.relative_to(ROOT) for room in rooms for path in (ROOT / room).rglob("*.py")}
    missing = there - set(named)
    # A folder's own line stands for an __init__.py that only names what lies in it.
    assert {path for path in missing if path.name != "__init__.py" or path.parent not in named} == set()
