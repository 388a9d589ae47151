"""The scripts as a user runs them: what a mistake costs is one line that names the cure."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*words: str, script: str = "train.py") -> subprocess.CompletedProcess[str]:
    environ = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "scripts" / script), *words]
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120)


def message_of(*words: str) -> str:
    """What is said of a mistake: status 2, one line, no traceback."""
    done = run(*words)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    return done.stderr


QUICKSTART = ("--config", str(ROOT / "configs" / "quickstart.py"))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--optimizer.learning_rat", "1"), "--optimizer.learning_rate"),
        (("--mesh.context", "3"), "--mesh.context 4"),
        (("--data.seq_len", "4097"), "use 4096 or 4112"),
        (("--data.path", "/nowhere/at/all"), "/nowhere/at/all"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_a_mistake_on_the_command_line(words, expected, tmp_path):
    assert expected in message_of(*QUICKSTART, "--log.directory", str(tmp_path / "runs"), *words)
    assert not (tmp_path / "runs").exists()


def test_a_misspelt_field_in_the_config_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("from ringattn.config import Config, Model\nconfig = Config(model=Model(head=4))\n")
    message = message_of("--config", str(path))
    assert "model.heads" in message
    assert "mine.py, line 2" in message


def test_an_empty_data_folder(tmp_path):
    (tmp_path / "empty").mkdir()
    words = ("--data.path", str(tmp_path / "empty"), "--log.directory", str(tmp_path / "runs"))
    assert str(tmp_path / "empty") in message_of(*QUICKSTART, *words)


def test_a_path_that_cannot_be_read(tmp_path):
    (tmp_path / "text.txt").write_text("a file, and no folder")
    assert "text.txt" in message_of(*QUICKSTART, "--data.path", str(tmp_path / "text.txt" / "inside"))


def test_help_lists_every_field():
    done = run("--help")
    assert done.returncode == 0
    assert "--optimizer.learning_rate" in done.stdout
