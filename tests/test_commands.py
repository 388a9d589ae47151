"""Runs commands of all READMEs, in order, with flags that reduce each run to seconds."""

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
from conftest import FAST_COMPILATION
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
    ("configs/staged.py", "--data.seq_len - --train.steps -"),
    ("configs/staged.py", " ".join(f"--stages.{n}.steps 1 --stages.{n}.seq_len {32 << n}" for n in (1, 2, 3))),
    ("configs/dna.py", "--data.overlap 16"),
    ("configs/needle", "--data.path task:needle:128 --data.mixture 1"),
    ("scripts/eval.py", "--lengths 64 128 --samples 2 --batch_size 2"),
    ("eval_needle", "--lengths 256 --longer True"),
    ("eval_generated", "--lengths 256 --longer True"),
    ("configs/llama3", "--model.layers 1 --model.dim 64 --model.vocabulary 256 --topology cpu:8 --data.seq_len 256"),
    ("--max-context", "--data.seq_len 155648"),  # close to what fits: few lengths are tried
    ("scripts/generate.py", "--max_tokens 8 --chunk 32"),
    ("scripts/compare.py", "--tolerance 0.1"),  # one prediction more is a large difference in short rows
    ("scripts/benchmark.py", "--shard_tokens 16 --seconds 0 --simulate 8"),
]


PARSED = {
    "--train.steps 600": "test_loop.py: a run resumes with more steps",
    "--name second --resume never": "test_loop.py: resume; a new name is a new run, as in all other commands",
    "--name board --log.tensorboard True": "configs/tracked.py logs to TensorBoard",
    "--name traced --profile 10:12": "test_loop.py: a run with profile; test_profile.py",
    "--name nested --mesh.context_outer 2": "test_meshes.py: the mesh (1, 4, 1, 2)",
    "--name four --mesh.simulate 4": "test_mesh.py: simulated devices are started; one evaluation has four",
    "--name again --model.remat on": "configs/long_context.py has remat; test_meshes.py",
    "--name parts --train.batch_size 8": "test_meshes.py: microbatches",
    "configs/staged.py --stages.3.steps 200": "test_loop.py and test_resume.py: stages are resumed",
    "--name qwen3 --model.family qwen3": "test_families.py: qwen3; configs/gemma3_pattern.py is of another family",
    "--name mixed --model.window 256": "configs/gemma3_pattern.py has a pattern",
    "--name texts --data.path texts/**/*.md": "test_sources.py: patterns; configs/mixture.py has one",
    "--name corpus --data.path corpus.jsonl": "test_sources.py: JSONL",
    "--name both --data.path stdlib notes.jsonl": "configs/mixture.py is a mixture",
    "--name genome --data.path shards/genome": "test_scripts.py: shards are written and trained from",
    "configs/needle_window.py": "configs/needle.py and configs/window.py",
    "configs/eval_needle_window.py": "configs/eval_needle.py",
    "--topology v5e:16x16 --model.kv_heads 32": "configs/llama3_8b_1m.py; SHORTER makes the models equal",
    "--sweep chips": "test_sweep.py: a sweep by the real compiler",
    "--changes True": "test_changes.py: each change is compiled",
    "configs/auto.py --topology cpu:8": "test_rank.py: the script ranks a config that leaves all open",
    "--topology cpu:8 --json plan.json": "test_planning.py: the script writes its report as JSON",
    "--log.directory /shared/runs": "needs several hosts; test_multiprocess.py",
    "configs/benchmark_masks.py": "test_benchmark.py: masks of subjects",
    "configs/benchmark_cycles.py": "needs the TPU compiler, for half an hour; tests/test_cycles.py compiles a kernel",
}
"""{substring of a command: what runs the same code}. These commands are only parsed, by test_readme.py."""
RUN = [words for words in COMMANDS if words[0] == "python" and not any(part in " ".join(words) for part in PARSED)]


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
@pytest.mark.parametrize("command", RUN, ids=" ".join)
def test_a_command_runs(command, clone):
    """Must run in order: some commands read the output of earlier ones."""
    environ = {name: value for name, value in os.environ.items() if name not in {"XLA_FLAGS", "JAX_PLATFORMS"}}
    environ |= {"PYTHONPATH": str(ROOT), "HOME": str(clone), "WANDB_MODE": "offline", "XLA_FLAGS": FAST_COMPILATION}
    words = [sys.executable, *shortened(command)]
    words = [str(clone / word[2:]) if word.startswith("~/") else word for word in words]
    done = subprocess.run(words, cwd=clone, env=environ, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def test_commands_that_are_only_parsed():
    """Each is in a README, and each script is run by other commands."""
    lines = [" ".join(words) for words in COMMANDS if words[0] == "python"]
    for part in PARSED:
        assert [line for line in lines if part in line], part
    scripts = {words[2] if words[1] == "-m" else words[1] for words in COMMANDS if words[0] == "python"}
    assert scripts == {words[2] if words[1] == "-m" else words[1] for words in RUN}


def test_the_extras_exist():
    """The READMEs and CONTRIBUTING.md name exactly the extras of pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    text = " ".join("\n".join(map(read, [*READMES, CONTRIBUTING])).split())
    named = re.findall(r"pip install -e '\.\[([a-z,-]+)\]'", text)
    assert {extra for names in named for extra in names.split(",")} == set(project["optional-dependencies"])
