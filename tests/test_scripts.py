"""Runs the scripts as a user does. Invalid input gives a one-line error message with a fix."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import is_dataclass
from pathlib import Path

import pytest
from conftest import FAST_COMPILATION
from gguf_models import write_gguf

from ringattn.config import Benchmark, Config, Evaluation, Generation

ROOT = Path(__file__).parents[1]


def run(*words: str, script: str = "train.py") -> subprocess.CompletedProcess[str]:
    environ = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": FAST_COMPILATION}
    command = [sys.executable, str(ROOT / "scripts" / script), *words]
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120)


def error_of(*words: str, script: str = "train.py") -> str:
    """Returns the error message of a script, after the checks of `error_in`."""
    return error_in(run(*words, script=script))


def error_in(done: subprocess.CompletedProcess[str]) -> str:
    """Returns the error message, after checking that it is one line without traceback, with status 2."""
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.strip().splitlines()) == 1
    return done.stderr


@pytest.fixture
def run_here(monkeypatch, capsys):
    """run_here(script, *words): status and output of a script's main in this process, which saves the imports."""

    def run(script: str, *words: str) -> subprocess.CompletedProcess[str]:
        spec = importlib.util.spec_from_file_location(script.removesuffix(".py"), ROOT / "scripts" / script)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        monkeypatch.setattr(sys, "argv", [script, *words])
        spec.loader.exec_module(module)
        with pytest.raises(SystemExit) as end:
            module.main()
        return subprocess.CompletedProcess(words, int(end.value.code or 0), *capsys.readouterr())

    return run


QUICKSTART = ("--config", str(ROOT / "configs" / "quickstart.py"))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--optimizer.learning_rat", "1"), "--optimizer.learning_rate"),
        (("--mesh.context", "3"), "--mesh.context 4"),
        (("--data.seq_len", "4097"), "use 4096 or 4112"),
        (("--data.path", "/missing/directory"), "/missing/directory"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_a_mistake_on_the_command_line(words, expected, tmp_path):
    assert expected in error_of(*QUICKSTART, "--log.directory", str(tmp_path / "runs"), *words)
    assert not (tmp_path / "runs").exists()


def test_a_misspelt_field_in_the_config_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("from ringattn.config import Config, Model\nconfig = Config(model=Model(head=4))\n")
    message = error_of("--config", str(path))
    assert "model.heads" in message
    assert "mine.py, line 2" in message


def test_an_empty_data_directory(tmp_path):
    (tmp_path / "empty").mkdir()
    words = ("--data.path", str(tmp_path / "empty"), "--log.directory", str(tmp_path / "runs"))
    assert str(tmp_path / "empty") in error_of(*QUICKSTART, *words)


def test_a_path_that_cannot_be_read(tmp_path):
    (tmp_path / "text.txt").write_text("a file, not a directory")
    assert "text.txt" in error_of(*QUICKSTART, "--data.path", str(tmp_path / "text.txt" / "inside"))


SCRIPT_OPTIONS = {
    "train.py": {"--config", "--processes", "--simulate", "--restarts"},
    "eval.py": {"--config"},
    "benchmark.py": {"--config"},
    "generate.py": {"--config", "--json"},
    "plan.py": {"--config", "--topology", "--json", "--stage", "--decode"}
    | {"--max_context", "--sweep", "--changes", "--ranking", "--cache"},
    "prepare.py": {"--config", "--output"},
    "convert.py": {"--to"},
    "compare.py": {"--tolerance", "--plot", "--json"},
}
"""Options of each script that are not config values."""
SECTIONS = {
    "plan.py": {"name", "model", "data", "mesh", "attention", "optimizer", "train", "log", "stages"},
    "prepare.py": {"data"},
    "convert.py": set(),
    "compare.py": set(),
}
"""Sections of the training config that a script uses. train.py uses all."""


def options_of(values: object, prefix: str = "--") -> set[str]:
    """Returns the options for the fields of a config and of its sections."""
    names = set()
    for name, value in vars(values).items():
        if name == "stages":
            names |= {option for stage in value for option in options_of(stage, f"{prefix}stages.1.")}
        else:
            names |= options_of(value, f"{prefix}{name}.") if is_dataclass(value) else {prefix + name}
    return names


@pytest.mark.parametrize("script", SCRIPT_OPTIONS)
def test_help_lists_the_options_of_the_script_and_no_others(script):
    done = run("--help", script=script)
    assert done.returncode == 0
    expected = options_of(
        {"eval.py": Evaluation, "benchmark.py": Benchmark, "generate.py": Generation}.get(script, Config)()
    )
    if script in SECTIONS:
        expected = {option for option in expected if option.split(".")[0].removeprefix("--") in SECTIONS[script]}
    listed = re.findall(r"^[│|] (?:-h, )?(--\S+)", done.stdout, re.M)
    assert len(listed) == len(set(listed))
    assert set(listed) - {"--help"} == expected | SCRIPT_OPTIONS[script]


@pytest.mark.parametrize(
    ("script", "words", "message"),
    [
        (
            "plan.py",
            ("--checkpoint.every", "1"),
            "--checkpoint.every is an option of scripts/train.py, not of this script",
        ),
        ("prepare.py", ("--name", "x"), "--name is an option of scripts/train.py, not of this script"),
        ("plan.py", ("--stag", "1"), "unknown '--stag': did you mean '--stage'?"),
        ("plan.py", ("--stage", "x"), "--stage x must be an integer"),
        ("prepare.py", ("--train.steps", "1"), "--train.steps is an option of scripts/train.py, not of this script"),
        ("prepare.py", ("--data.pth", "x"), "unknown '--data.pth': did you mean '--data.path'?"),
        ("prepare.py", ("--output",), "--output needs a value: a string"),
        ("train.py", ("--topology", "v5e:8x8"), "unknown '--topology'"),
    ],
)
def test_options_of_other_scripts_are_errors(run_here, script, words, message):
    assert message in error_in(run_here(script, *QUICKSTART, *words))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--subjects", "ring zigzg"), "did you mean 'ring zigzag'?"),
        (("--rings", "16"), "use --rings -1, or --simulate 16"),
        (("--config", str(ROOT / "configs" / "quickstart.py")), "use a Benchmark, such as configs/benchmark.py"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_a_mistake_in_a_benchmark(words, expected, tmp_path):
    benchmark = ("--config", str(ROOT / "configs" / "benchmark.py"), "--directory", str(tmp_path / "runs"))
    assert expected in error_of(*benchmark, *words, script="benchmark.py")
    assert not (tmp_path / "runs").exists()


def test_a_benchmark_on_the_command_line(tmp_path):
    words = ("--shard_tokens", "16", "--rings", "2", "--simulate", "4", "--seconds", "0", "--directory", str(tmp_path))
    subjects = ("--subjects", "ring zigzag", "dense", "--baselines", "dense")
    config = ("--config", str(ROOT / "configs" / "benchmark.py"))
    done = run(*config, *words, *subjects, script="benchmark.py")
    assert done.returncode == 0, done.stderr
    assert "32 tokens on a ring of 2, 8 heads of 64, float32" in done.stdout
    assert (tmp_path / "benchmark" / "plots" / "benchmark.png").is_file()
    repeated = ("--config", str(tmp_path / "benchmark" / "config.json"), "--subjects", "dense")
    assert run(*repeated, script="benchmark.py").returncode == 0
    rows = json.loads((tmp_path / "benchmark" / "results.json").read_text())["rows"]
    assert [(row["subject"], row["pass"]) for row in rows] == [("dense", "forward"), ("dense", "forward+backward")]


@pytest.mark.slow
def test_shards_are_written_and_trained_from(tmp_path):
    (tmp_path / "g.fa").write_bytes(b">a\n" + bytes(b"ACGT"[i * i * 7 % 11 % 4] for i in range(4000)) + b"\n")
    dna = ("--config", str(ROOT / "configs" / "dna.py"))
    source, output = ("--data.path", str(tmp_path / "g.fa")), ("--output", str(tmp_path / "shards"))
    assert "--output is required, such as --output shards" in error_of(*dna, *source, script="prepare.py")
    done = run(*dna, *source, *output, script="prepare.py")
    assert done.returncode == 0, done.stderr
    assert "4,001 tokens" in done.stdout
    small = ("--data.seq_len", "64", "--data.overlap", "8", "--train.steps", "1", "--log.directory", str(tmp_path))
    done = run(*dna, "--data.path", str(tmp_path / "shards"), *small)
    assert done.returncode == 0, done.stderr
    assert "validation loss" in done.stdout
    with (tmp_path / "shards" / "shard-00000.bin").open("ab") as file:
        file.truncate(2000)
    message = error_of(*dna, "--data.path", str(tmp_path / "shards"), *small)
    assert f"{tmp_path}/shards/shard-00000.bin has 2000 bytes instead of 4002" in message


@pytest.mark.slow
def test_an_interrupted_or_killed_prepare_leaves_no_output_directory(tmp_path):
    def temporary() -> list[Path]:
        return [path for path in tmp_path.glob(".s.*") if path.is_dir()]

    (tmp_path / "t.jsonl").write_text('{"text": "some words"}\n' * 300_000)
    words = [*QUICKSTART, "--data.path", str(tmp_path / "t.jsonl"), "--output", str(tmp_path / "s")]
    command, environ = (
        [sys.executable, str(ROOT / "scripts" / "prepare.py"), *words],
        os.environ | {"PYTHONPATH": str(ROOT)},
    )
    for number, status, left in ((signal.SIGINT, 130, 0), (signal.SIGKILL, -signal.SIGKILL, 1)):
        with subprocess.Popen(command, env=environ, stderr=subprocess.PIPE, text=True) as process:
            while process.poll() is None and not temporary():
                time.sleep(0.01)
            process.send_signal(number)
            _, err = process.communicate()
        assert process.returncode == status
        assert err == "stopped by SIGINT; run the same command again to start over\n" * (number == signal.SIGINT)
        assert len(temporary()) == left
        assert not (tmp_path / "s").exists()
    done = run(*words, script="prepare.py")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "s" / "index.json").is_file()


FAMILIES = ROOT / "tests" / "data" / "families"


def test_weights_are_converted_both_ways(tmp_path):
    pytest.importorskip("tokenizers")
    write_gguf(FAMILIES / "llama", tmp_path / "model.gguf")
    for source, target, words in (
        ("model.gguf", "huggingface", ()),
        ("huggingface", "run", ("--to", "run")),
        ("run", "again", ("--to", "huggingface")),
    ):
        done = run(str(tmp_path / source), str(tmp_path / target), *words, script="convert.py")
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"{tmp_path / target}: llama model of 9,552 parameters\n"
    one, other = (tmp_path / name / "model.safetensors" for name in ("huggingface", "again"))
    assert one.read_bytes() == other.read_bytes()
    assert (tmp_path / "run" / "checkpoints" / "1").is_dir()


def test_a_mistake_in_a_conversion(tmp_path):
    (tmp_path / "pickle").mkdir()
    (tmp_path / "pickle" / "config.json").write_bytes((FAMILIES / "llama" / "config.json").read_bytes())
    (tmp_path / "pickle" / "pytorch_model.bin").touch()
    for words, expected in (
        ((str(tmp_path / "pickle"), str(tmp_path / "target")), "pytorch_model.bin, a pickle"),
        ((str(FAMILIES / "llama"), "--too", "run"), "unknown '--too': did you mean '--to'?"),
    ):
        assert expected in error_of(*words, script="convert.py")
    assert not (tmp_path / "target").exists()


def test_runs_are_compared(tmp_path):
    for name, loss in (("a", 2.0), ("b", 2.001)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": loss}) + "\n")
        for file in ("config.json", "environment.json"):
            (tmp_path / name / file).write_text(json.dumps({"name": name}))
    pair, files = (str(tmp_path / "a"), str(tmp_path / "b")), [tmp_path / "c.png", tmp_path / "c.json"]
    done = run(*pair, "--plot", str(files[0]), "--json", str(files[1]), script="compare.py")
    assert done.returncode == 1, done.stderr
    assert done.stdout.splitlines()[-1] == "different: loss at step 1"
    assert json.loads(files[1].read_text())["metrics"]["loss"]["first_beyond"] == 1
    assert files[0].read_bytes().startswith(b"\x89PNG")
    assert run(*pair, "--tolerance", "0.001", script="compare.py").returncode == 0
    for words, expected in (
        ((pair[0], str(tmp_path / "none")), "config.json is missing"),
        ((*pair, "--tolerance", "-1"), "--tolerance -1.0 must be a number of at least 0"),
        ((*pair, "--json", str(tmp_path / "none" / "c.json")), "does not exist"),
        (pair[:1], "A B are required"),
    ):
        assert expected in error_of(*words, script="compare.py")


EVALUATION = ("--config", str(ROOT / "configs" / "eval_needle.py"))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--runs", "nothing"), "nothing is not a run directory"),
        (("--tasks", "needel"), "did you mean 'needle'?"),
        (("--length", "128"), "did you mean '--lengths'?"),
        (("--depths", "2"), "between 0 and 1"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_a_mistake_in_an_evaluation(words, expected):
    assert expected in error_of(*EVALUATION, *words, script="eval.py")


def test_a_config_of_another_script_is_an_error():
    assert "for scripts/train.py; use an Evaluation" in error_of(*QUICKSTART, script="eval.py")
