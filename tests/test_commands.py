"""Runs the commands of all READMEs, in order, with flags that reduce each run to seconds."""

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
from test_file_tokenizer import train as tokenizer
from test_readme import COMMANDS, CONTRIBUTING, READMES, read
from test_video import film

ROOT = Path(__file__).parents[1]
SHORTER = [
    # (substring of a command, flags). The flags override those of the command and of earlier entries; "-" removes one.
    (
        "scripts/train.py",
        "--model.layers 1 --model.dim 32 --model.head_dim 8 --model.feed_forward 32 --data.seq_len 128 "
        "--train.steps 2 --optimizer.warmup_steps 1 --validation.batches 1",
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


def shortened(command: tuple[str, ...]) -> list[str]:
    """Returns the words after `python`, with the flags of SHORTER applied."""
    words = list(command[1:])
    flags: dict[str, list[str]] = {}
    values = positional = []  # `values` are the words of the current flag
    for source in (words, *(shlex.split(flags) for part, flags in SHORTER if part in " ".join(words))):
        for word in source:
            if word.startswith("--"):
                flags[word] = values = []
            else:
                values.append(word)
    return [*positional, *(word for flag, values in flags.items() if values != ["-"] for word in (flag, *values))]


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """Returns a directory with the repository and the data files that the commands use."""
    directory = tmp_path_factory.mktemp("clone")
    for name in ("ringattn", "configs", "scripts"):
        (directory / name).symlink_to(ROOT / name)
    prose = "Queries attend to preceding keys only, so a causal mask halves the work.\n" * 60
    for name in ("notes/one.txt", "notes/two.txt", "texts/deep/one.md", "texts/two.md"):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(prose + name)
    for name in ("corpus.jsonl", "notes.jsonl"):
        (directory / name).write_text("\n".join(json.dumps({"text": f"{number}: {prose}"}) for number in range(8)))
    bases = "".join(random.Random(0).choices("ACGT", k=20_000))
    (directory / "genome.fa.gz").write_bytes(gzip.compress(f">all\n{bases}\n".encode()))
    (directory / "film.mp4").write_bytes(film(100, size=(48, 64)))
    tokenizer(["<pad>", "<|endoftext|>"]).save(str(directory / "tokenizer.json"))
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("command", [words for words in COMMANDS if words[0] == "python"], ids=" ".join)
def test_a_command_runs(command, clone):
    """Must run in order: some commands read the output of earlier ones."""
    if "configs/benchmark_cycles.py" in command:
        pytest.skip("needs the TPU compiler, for half an hour; tests/test_cycles.py compiles a kernel")
    environ = {name: value for name, value in os.environ.items() if name not in {"XLA_FLAGS", "JAX_PLATFORMS"}}
    environ |= {"PYTHONPATH": str(ROOT), "HOME": str(clone), "WANDB_MODE": "offline"}
    words = [sys.executable, *shortened(command)]
    words = [str(clone / word[2:]) if word.startswith("~/") else word for word in words]
    done = subprocess.run(words, cwd=clone, env=environ, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_extras_exist():
    """The READMEs and CONTRIBUTING.md name exactly the extras of pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    text = " ".join("\n".join(map(read, [*READMES, CONTRIBUTING])).split())
    named = re.findall(r"pip install -e '\.\[([a-z,]+)\]'", text)
    assert {extra for names in named for extra in names.split(",")} == set(project["optional-dependencies"])
