"""The scripts as a user runs them: what a mistake costs is one line that names the cure."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*words: str, script: str = "train.py") -> subprocess.CompletedProcess[str]:
    environ = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "scripts" / script), *words]
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120)


def message_of(*words: str, script: str = "train.py") -> str:
    """What is said of a mistake: status 2, one line, no traceback."""
    done = run(*words, script=script)
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


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--subjects", "ring zigzg"), "did you mean 'ring zigzag'?"),
        (("--rings", "16"), "use --rings -1, or --simulate 16"),
        (("--config", str(ROOT / "configs" / "quickstart.py")), "such as --config configs/benchmark.py"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_a_mistake_in_a_benchmark(words, expected, tmp_path):
    benchmark = ("--config", str(ROOT / "configs" / "benchmark.py"), "--directory", str(tmp_path / "runs"))
    assert expected in message_of(*benchmark, *words, script="benchmark.py")
    assert not (tmp_path / "runs").exists()


def test_a_benchmark_on_the_command_line(tmp_path):
    words = ("--shard_tokens", "16", "--rings", "2", "--simulate", "4", "--seconds", "0", "--directory", str(tmp_path))
    subjects = ("--subjects", "ring zigzag", "dense", "--baselines", "dense")
    config = ("--config", str(ROOT / "configs" / "benchmark.py"))
    done = run(*config, *words, *subjects, script="benchmark.py")
    assert done.returncode == 0, done.stderr
    assert "32 tokens over a ring of 2, 8 heads of 64, float32" in done.stdout
    assert (tmp_path / "benchmark" / "plots" / "benchmark.png").is_file()
    repeated = ("--config", str(tmp_path / "benchmark" / "config.json"), "--subjects", "dense")
    assert run(*repeated, script="benchmark.py").returncode == 0
    rows = json.loads((tmp_path / "benchmark" / "results.json").read_text())["rows"]
    assert [(row["subject"], row["pass"]) for row in rows] == [("dense", "forward"), ("dense", "forward+backward")]


def test_shards_are_written_and_trained_from(tmp_path):
    (tmp_path / "g.fa").write_bytes(b">a\n" + bytes(b"ACGT"[i * i * 7 % 11 % 4] for i in range(4000)) + b"\n")
    dna = ("--config", str(ROOT / "configs" / "dna.py"))
    source, output = ("--data.path", str(tmp_path / "g.fa")), ("--output", str(tmp_path / "shards"))
    assert "no folder to write to" in message_of(*dna, *source, script="prepare.py")
    done = run(*dna, *source, *output, script="prepare.py")
    assert done.returncode == 0, done.stderr
    assert "4,001 tokens" in done.stdout
    small = ("--data.seq_len", "64", "--data.overlap", "8", "--train.steps", "1", "--log.directory", str(tmp_path))
    done = run(*dna, "--data.path", str(tmp_path / "shards"), *small)
    assert done.returncode == 0, done.stderr
    assert "validation loss" in done.stdout
    with (tmp_path / "shards" / "shard-00000.bin").open("ab") as file:
        file.truncate(2000)
    message = message_of(*dna, "--data.path", str(tmp_path / "shards"), *small)
    assert f"{tmp_path}/shards/shard-00000.bin has 2000 bytes instead of 4002" in message


def test_a_prepare_that_is_killed_leaves_nothing_that_passes_for_whole(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"text": "some words"}\n' * 300_000)
    words = [*QUICKSTART, "--data.path", str(tmp_path / "t.jsonl"), "--output", str(tmp_path / "s")]
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, str(ROOT / "scripts" / "prepare.py"), *words], env=environ) as process:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob(".s.*")) and time.monotonic() < deadline:
            time.sleep(0.01)
        process.kill()
    assert len(list(tmp_path.glob(".s.*"))) == 1
    assert not (tmp_path / "s").exists()
    done = run(*words, script="prepare.py")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "s" / "index.json").is_file()


EVALUATION = ("--config", str(ROOT / "configs" / "eval_needle.py"))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--runs", "nothing"), "nothing holds no run"),
        (("--tasks", "needel"), "did you mean 'needle'?"),
        (("--length", "128"), "did you mean '--lengths'?"),
        (("--depths", "2"), "between 0 and 1"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_a_mistake_in_what_is_evaluated(words, expected):
    assert expected in message_of(*EVALUATION, *words, script="eval.py")


def test_a_config_of_another_script_is_named():
    assert "for scripts/train.py: scripts/eval.py takes an Evaluation" in message_of(*QUICKSTART, script="eval.py")
