"""scripts/generate.py: prompts, answers, saved caches and its errors."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from random_runs import make_run

from ringattn import config
from ringattn.generation import command

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> str:
    return str(make_run(tmp_path_factory.mktemp("runs") / "bytes", b"Some text to read. " * 200))


def generate(capsys, path: str, as_json: bool = False, **options) -> tuple[str, str]:
    """Runs the command. Returns its standard output and its standard error."""
    command.run(config.Generation(**{"run": path, "max_tokens": 12, "chunk": 32, **options}), as_json=as_json)
    return capsys.readouterr()


def test_an_answer_is_streamed_and_its_speed_reported(capsys, run):
    answer, report = generate(capsys, run, prompt="Some")
    content = json.loads(generate(capsys, run, as_json=True, prompt="Some")[0])
    assert content["prompt_tokens"] == 5  # with the boundary
    [result] = content["results"]
    assert (len(result["tokens"]), len(result["log_probs"]), result["finish"]) == (12, 12, "length")
    assert answer == result["text"] + "\n"
    assert [line.split(":")[0] for line in report.splitlines()[-3:]] == ["prefill", "decode", "cache"]
    assert "decode: 12 tokens" in report


def test_the_prompt_is_a_file_or_standard_input(capsys, run, monkeypatch, tmp_path):
    expected, _ = generate(capsys, run, prompt="Some")
    (tmp_path / "prompt.txt").write_text("Some")
    assert generate(capsys, run, prompt_file=str(tmp_path / "prompt.txt"))[0] == expected
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Some")))
    assert generate(capsys, run)[0] == expected


def test_a_cache_is_saved_and_asked(capsys, run, tmp_path):
    whole, _ = generate(capsys, run, prompt="Some text")
    cache = str(tmp_path / "cache")
    saved, _ = generate(capsys, run, prompt="Some", save_cache=cache)
    assert saved.startswith(f"{cache}: cache of 5 tokens, ")
    assert generate(capsys, run, prompt=" text", cache=cache)[0] == whole


def test_several_samples_are_numbered(capsys, run):
    text, report = generate(capsys, run, prompt="Some", samples=2, temperature=1.0)
    assert text.startswith("=== 1\n")
    assert "\n=== 2\n" in text
    assert "5 tokens of the prompt and 24 tokens of 2 answers in " in report


def test_errors_are_one_line_with_a_fix(capsys, run, monkeypatch, tmp_path):
    (tmp_path / "latin1.txt").write_bytes(b"caf\xe9")
    (tmp_path / "empty.txt").write_bytes(b"")
    cases = [
        ({"run": None}, "no model is given; use --run"),
        ({"run": str(tmp_path / "none"), "prompt": "a"}, "none"),
        ({"prompt_file": str(tmp_path / "none.txt")}, r"cannot be read \(No such file or directory\)"),
        ({"prompt_file": str(tmp_path / "latin1.txt")}, "is not valid UTF-8 at byte 3"),
        ({"prompt_file": str(tmp_path / "empty.txt")}, "is empty"),
        ({"prompt": "a", "temperature": -1.0}, "temperature=-1.0 must be"),
        ({"prompt": "a" * 300}, "do not fit cache_tokens=256; use a shorter prompt"),
        ({"prompt": "a", "chat": True}, "the model has no chat template"),
        ({"prompt": "a", "cache": str(tmp_path)}, "is not a saved cache: it lacks cache.json"),
        ({"prompt": "a", "save_cache": str(tmp_path)}, "is not empty"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            generate(capsys, run, **options)
    for options, message in [
        ({"prompt": "a", "prompt_file": "b"}, "prompt_file='b' must be None"),
        ({"weights": "x"}, "weights='x' must be None"),
        ({"cache_dtype": "int4"}, "cache_dtype='int4' must be"),
        ({"samples": 2, "chat": True}, "samples=2 must be 1 with chat"),
    ]:
        with pytest.raises(ValueError, match=message):
            generate(capsys, run, **options)


def test_the_script_ends_with_status_2():
    words = [sys.executable, "scripts/generate.py", "--run", "x", "--tempertaure", "1"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: unknown '--tempertaure': did you mean '--temperature'?\n"
