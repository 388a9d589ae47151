"""Cases of `fuzz.py` with mutated files, read as training, evaluation and generation read them."""

import dataclasses
import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
from fuzz_fixtures import TEXT, small_config, small_evaluation
from fuzz_outcome import Outcome, ReachedError, WrongError, judge
from mutations import change_bytes, change_json, misspelt

from ringattn import config, data, evaluation, training, weights
from ringattn.generation import Generator
from ringattn.generation.prompts import Texts
from ringattn.runs.metrics import read_rows
from ringattn.training.plots import plot_loss
from ringattn.weights.origin import adopt, find_origin

TEMPLATES = (
    "{% for i in range(10**9) %}x{% endfor %}",
    "{{ messages[9].content }}",
    "{{ ''.__class__.__mro__ }}",
    "{% if %}",
)
TEMPLATES += (
    "{{ 'x' * 10**9 }}",
    "{{ raise_exception('no\nway') }}",
    "{{ 1 / 0 }}",
    "{% include '/etc/passwd' %}",
    "{{ 9 ** 9 ** 9 }}",
)


@dataclass(frozen=True)
class Subject:
    """Intact files, and how they are read."""

    source: str
    """File or directory in the directory of fixtures."""
    read: Callable[[Path, Path], str]
    """read(copy, fixtures): reads the changed copy; returns a digest of what it found."""
    exact: bool = False
    """True if checksums tell every change: what is accepted is as in the intact files."""
    share: int = 1
    """Relative number of cases."""


def digest(*parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode(errors="backslashreplace")).hexdigest()[:16]


def arrays_digest(tree: Any) -> str:
    return digest(*(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)))


def read_data(path: Path, fixtures: Path) -> str:
    names = {".fa": "dna", ".mp4": "video"}
    suffix = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    name = names.get(suffix, "bytes" if path.is_file() else str(fixtures / "tokenizer.json"))
    c = config.Data(path=str(path), tokenizer=name, seq_len=32, validation=0.3, frame_size=(16, 24))
    training, held_out = data.make_loaders(data.read(c), c, 1, 0, 0)
    training.batch(0)
    held_out.batch(0)
    return digest(training.fingerprint, held_out.fingerprint)


def read_tokenizer(path: Path, fixtures: Path) -> str:
    tokenizer = data.load_tokenizer(str(path))
    ids = tokenizer.encode(TEXT.encode())
    tokenizer.decode(ids[:50])
    assert ids.size == 0 or ids.max() < tokenizer.size
    return ""


def read_codebook(path: Path, fixtures: Path) -> str:
    tokenizer = data.load_tokenizer(str(path / "codebook.npy"), (16, 24))
    assert isinstance(tokenizer, data.VideoTokenizer)
    tokenizer.reconstruct_preview()
    return ""


def read_weights(path: Path, fixtures: Path) -> str:
    c = config.Config(
        model=config.Model(weights=str(path)), data=config.Data(tokenizer=str(fixtures / "tokenizer.json"))
    )
    origin = find_origin(str(path))
    if origin.tokenizer_name is None:
        adopt(c, ("data.tokenizer",))
    else:
        origin.tokenizer(adopt(config.Config(model=c.model)).data)
    if origin.chat_template is not None:
        origin.chat_template.frame("a")
    loaded = weights.load(path, config.Mesh())
    Texts.of(loaded)
    loaded.details.end_ids()
    return ""


def read_run(path: Path, fixtures: Path) -> str:
    return arrays_digest(weights.load(path, config.Mesh()).params)


def resume_run(path: Path, fixtures: Path) -> str:
    """Resumes a run up to its first step. Returns the digest of the restored state."""
    c = small_config(fixtures)
    c = dataclasses.replace(c, log=dataclasses.replace(c.log, directory=str(path.parent)))
    c = dataclasses.replace(c, stages=(config.Stage(steps=3), config.Stage(steps=5)))
    found: list[str] = []

    def advance(run: Any, state: Any, *others: Any) -> Any:
        found.append(arrays_digest(state))
        plot_loss(read_rows(path / "metrics.jsonl"), path / "loss.png", "fuzzed")  # as at the end of a run
        raise ReachedError

    with mock.patch("ringattn.training.loop.advance", advance):
        try:
            training.train(c)
        except ReachedError:
            return found[0]
    raise AssertionError("the run has nothing to do")


def read_evaluation(path: Path, fixtures: Path) -> str:
    """Reports an evaluation whose results are stored. Computes none."""

    def load(*arguments: Any) -> Any:
        raise ReachedError

    with mock.patch("ringattn.evaluation.subject.Subject.load", load):
        evaluation.evaluate(small_evaluation(fixtures, path.parent))
    return ""


@cache
def generator(fixtures: Path) -> Generator:
    return Generator.load(fixtures / "model", config.Mesh(), cache_tokens=64, chunk=16)


def read_cache(path: Path, fixtures: Path) -> str:
    found = generator(fixtures).load_cache(path)
    return arrays_digest((found.tokens, found.cache.stores))


TEXTS = ("plain.txt", "lines.jsonl", "pairs.jsonl", "bases.fa", "rows.parquet", "film.mp4", "")
COMPRESSED = ("lines.jsonl.gz", "bases.fa.gz", "blocks.fa.gz")
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3")
SUBJECTS = {
    "text": [Subject(f"texts/{name}".rstrip("/"), read_data) for name in TEXTS],
    "compressed": [Subject(f"texts/{name}", read_data, exact=True) for name in COMPRESSED],
    "shards": [Subject("shards", read_data, exact=True, share=6)],
    "tokenizer": [Subject("tokenizer.json", read_tokenizer, share=6)],
    "codebook": [Subject("codebook", read_codebook, share=2)],
    "huggingface": [Subject("model", read_weights, share=6)]
    + [Subject(f"families/{name}", read_weights) for name in FAMILIES],
    "gguf": [Subject("model.gguf", read_weights, share=4), Subject("gemma3.gguf", read_weights, share=2)],
    "run, read": [Subject("runs/fuzzed", read_run, exact=True, share=4)],
    "run, resumed": [Subject("runs/fuzzed", resume_run, exact=True, share=8)],
    "run, evaluated": [Subject("runs/fuzzed", read_evaluation, share=4)],
    "saved cache": [Subject("cache", read_cache, exact=True, share=3)],
}
CONCERNED = {
    "run, read": ("config.json", "tokenizer.json", "checkpoints"),
    "run, resumed": ("config.json", "tokenizer.json", "checkpoints", "metrics.jsonl", "data.json", "environment.json"),
    "run, evaluated": ("config.json", "tokenizer.json", "data.json", "evaluations"),
}
"""Files and directories that cases of a kind change; all by default."""


def expected(fixtures: Path, work: Path, all_subjects: bool = True) -> dict[str, list[str]]:
    """Returns the digests of the intact files of each subject, which all must be accepted, or of the exact ones.

    A run may also resume from its older checkpoint.
    """
    found: dict[str, list[str]] = {}
    for subject in (subject for subjects in SUBJECTS.values() for subject in subjects):
        if not (fixtures / subject.source).exists() or not (subject.exact or all_subjects):
            continue
        path = copied(subject, fixtures, work / "intact")
        key = f"{subject.source} {subject.read.__name__}"
        found[key] = [subject.read(path, fixtures)]
        if subject.read in (resume_run, read_run):
            shutil.rmtree(work)
            path = copied(subject, fixtures, work / "intact")
            shutil.rmtree(path / "checkpoints" / "4")
            found[key].append(subject.read(path, fixtures))
        shutil.rmtree(work)
    return found


def copied(subject: Subject, fixtures: Path, directory: Path) -> Path:
    """Copies the files of a subject to `directory`; returns the path of the copy."""
    source, target = fixtures / subject.source, directory / subject.source
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target)
    else:
        shutil.copy(source, target)
    return target


def file_case(rng: random.Random, directory: Path, fixtures: Path, only: str | None = None) -> tuple[str, str, Outcome]:
    """Draws, writes and reads a case, of kind `only` unless it is None.

    Returns its kind, what is changed, and the outcome.
    """
    groups = SUBJECTS if only is None else {only: SUBJECTS[only]}
    drawn = [(kind, subject) for kind, group in groups.items() for subject in group for _ in range(subject.share)]
    kind, subject = rng.choice(drawn)
    path = copied(subject, fixtures, directory)
    intact = json.loads((fixtures / "expected.json").read_text())
    said = change(rng, path, CONCERNED.get(kind, ("",)))

    def call() -> None:
        found = subject.read(path, fixtures)
        if subject.exact and found not in intact[f"{subject.source} {subject.read.__name__}"]:
            raise WrongError("the content differs from the intact one")

    return kind, said, judge(call)


def change(rng: random.Random, path: Path, concerned: tuple[str, ...]) -> str:
    """Changes one or two files below `path`. Returns what it did."""
    said = []
    for _ in range(rng.choice((1, 1, 1, 2))):
        tops = [path / name for name in concerned] if path.is_dir() else [path]
        top = rng.choice([each for each in tops if each.exists()] or [path])
        files = sorted(top.rglob("*")) if top.is_dir() else [top]
        files = [file for file in files if file.is_file() and not file.is_symlink() and file.stat().st_size < 2**20]
        if not files:
            break
        file = rng.choice(files)
        single = path == file
        said.append(f"{file.relative_to(path.parent)}: {change_file(rng, file, single)}")
    return ", then ".join(said)


def change_file(rng: random.Random, file: Path, single: bool) -> str:
    """Changes the content of a file, or what is at its path."""
    if rng.random() < 0.12:
        return replace_file(rng, file)
    content = file.read_bytes()
    if rng.random() < 0.7:
        if file.suffix == ".jsonl":
            said, content = change_lines(rng, content)
        elif file.suffix == ".json" or file.name in ("_METADATA", "_CHECKPOINT_METADATA"):
            said, content = change_json(rng, content)
        elif file.suffix == ".safetensors":
            length = int.from_bytes(content[:8], "little")
            said, header = change_json(rng, content[8 : 8 + length])
            content = len(header).to_bytes(8, "little") + header + content[8 + length :]
        elif file.suffix == ".jinja":
            added = rng.choice(TEMPLATES)
            said, content = f"{added!r} added", content + added.encode()
        elif file.suffix == ".gz" and rng.random() < 0.5:
            said, content = change_bytes(rng, content[:-8])[0], content[:-8] + rng.randbytes(8)
        else:
            said, content = change_bytes(rng, content)
    else:
        said, content = change_bytes(rng, content)
    file.write_bytes(content)
    return said


def change_lines(rng: random.Random, content: bytes) -> tuple[str, bytes]:
    """Changes, removes or repeats a line of JSON lines."""
    lines = content.splitlines(keepends=True)
    if not lines:
        return change_bytes(rng, content)
    at, action = rng.randrange(len(lines)), rng.randrange(6)
    if action == 0:
        return f"line {at + 1} removed", b"".join(lines[:at] + lines[at + 1 :])
    if action == 1:
        return f"line {at + 1} twice", b"".join([*lines[: at + 1], *lines[at:]])
    said, changed = change_json(rng, lines[at])
    lines[at] = changed.replace(b"\n", b" ") + b"\n"
    return f"line {at + 1}: {said}", b"".join(lines)


def replace_file(rng: random.Random, file: Path) -> str:
    """Puts something else at the path of a file."""
    action = rng.randrange(6)
    content = file.read_bytes()
    if action == 5 and file.suffix not in (".jsonl", ".json", ".npy"):
        action = 0
    if action != 4:
        file.unlink()
    if action == 0:
        return "removed"
    if action == 1:
        file.mkdir()
        return "is a directory"
    if action == 2:
        file.symlink_to(rng.choice(("/nonexistent", file.name, "/etc/hostname", "/dev/zero")))
        return f"is a link to {os.readlink(file)}"
    if action == 3:
        os.mkfifo(file)
        return "is a pipe"
    if action == 4:
        name = misspelt(rng, file.name).replace("/", "_").strip(". ") or "x"
        shutil.copy(file, file.with_name(name if name != file.name else "x"))
        return f"copied to {name!r}"
    with file.open("wb") as stream:  # takes no space on the disk
        stream.write(content)
        stream.truncate(200 * 2**30)
    return "has 200 GiB"
