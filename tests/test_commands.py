"""The README's commands run, one after another as its reader gives them, with flags that make each one of seconds."""

import gzip
import json
import os
import random
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from test_readme import COMMANDS
from test_tokenizer import train as tokenizer
from test_video import film

ROOT = Path(__file__).parents[1]
SHORTER = [
    # What a command says, and the flags that it is then given; they stand for its own, and for those above; "-" takes
    # a flag away.
    (
        "scripts/train.py",
        "--model.layers 1 --model.dim 32 --model.head_dim 8 --model.feed_forward 32 --data.seq_len 128 "
        "--train.steps 2 --optimizer.warmup_steps 1 --evaluate.batches 1",
    ),
    ("--train.steps 600", "--train.steps 3"),
    ("--profile 10:12", "--profile 1:2"),
    ("configs/staged.py", "--data.seq_len - --train.steps -"),
    ("configs/staged.py", " ".join(f"--stages.{n}.steps 1 --stages.{n}.seq_len {32 << n}" for n in (1, 2, 3))),
    ("--stages.3.steps 200", "--stages.3.steps 2"),
    ("configs/dna.py", "--data.overlap 16"),
    ("configs/needle", "--data.path task:needle:128 --data.mixture 1"),
    ("scripts/eval.py", "--lengths 64 128 --samples 2 --batch_size 2"),
    ("eval_needle", "--lengths 256 --longer True"),
    ("configs/llama3", "--model.layers 1 --model.dim 64 --model.vocabulary 256 --topology cpu:8 --data.seq_len 256"),
    ("scripts/benchmark.py", "--shard_tokens 16 --seconds 0 --simulate 8"),
]


def shortened(command: str) -> list[str]:
    """Its words after `python`, with the flags above."""
    words = shlex.split(command, comments=True)[1:]
    flags: dict[str, list[str]] = {}
    values = before = []  # of a flag; those before the first one stay as they are
    for each in (words, *(shlex.split(flags) for says, flags in SHORTER if says in " ".join(words))):
        for word in each:
            if word.startswith("--"):
                flags[word] = values = []
            else:
                values.append(word)
    return [*before, *(word for flag, values in flags.items() if values != ["-"] for word in (flag, *values))]


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """The repository, and beside it what a user has of his own."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("ringattn", "configs", "scripts"):
        (folder / name).symlink_to(ROOT / name)
    prose = "Of the keys that a device holds, its queries see those that came before them.\n" * 60
    for name in ("notes/one.txt", "notes/two.txt", "texts/deep/one.md", "texts/two.md"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(prose + name)
    for name in ("corpus.jsonl", "notes.jsonl"):
        (folder / name).write_text("\n".join(json.dumps({"text": f"{number}: {prose}"}) for number in range(8)))
    bases = "".join(random.Random(0).choices("ACGT", k=20_000))
    (folder / "genome.fa.gz").write_bytes(gzip.compress(f">all\n{bases}\n".encode()))
    (folder / "film.mp4").write_bytes(film(100, size=(48, 64)))
    tokenizer(["<pad>", "<|endoftext|>"]).save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("line", [line for line in COMMANDS if "python " in line])
def test_a_command_runs(line, clone):
    """In order: some go on from what others left."""
    environ = {name: value for name, value in os.environ.items() if name not in {"XLA_FLAGS", "JAX_PLATFORMS"}}
    environ |= {"PYTHONPATH": str(ROOT), "HOME": str(clone), "WANDB_MODE": "offline"}
    # Most of the time is XLA's, and most of the programs are the same.
    environ |= {"JAX_COMPILATION_CACHE_DIR": str(clone / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    for command in line.split("&&"):
        if not command.strip().startswith("python "):
            continue  # installing, which has been done; what else is installed is tested below
        words = [sys.executable, *shortened(command)]
        words = [str(clone / word[2:]) if word.startswith("~/") else word for word in words]
        done = subprocess.run(words, cwd=clone, env=environ, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr


def test_what_is_installed_can_be():
    """The extras that the README names are those of the project, and all of them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    readme = (ROOT / "README.md").read_text(encoding="utf-8") + (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = re.findall(r"pip install -e '\.\[([a-z,]+)\]'", readme)
    assert {extra for names in named for extra in names.split(",")} == set(project["optional-dependencies"])
