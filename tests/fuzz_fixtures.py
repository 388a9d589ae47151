"""Intact files for `fuzz.py`: texts, token shards, tokenizers, models, a trained run and a saved cache."""

import gzip
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import tokenizers
from gguf_models import write_gguf

from ringattn import config, evaluation, training, weights
from ringattn.data import prepare
from ringattn.data.formats import BGZF_END
from ringattn.data.video import as_npy
from ringattn.generation import Generator

ROOT = Path(__file__).parents[1]
FAMILIES = ROOT / "tests" / "data" / "families"
TEXT = "".join(f"def f{number}(x):\n    return x * {number}  # é 漢 🙂\n" for number in range(300))
CHAT = "{{ bos_token }}{% for m in messages %}<|im_end|>{{ m.role }} {{ m.content }}{% endfor %}ab"


def make_fixtures(base: Path, run: bool = True) -> Path:
    """Creates the files in the directory `base`. With `run`, also a run and a cache, which takes half a minute."""
    (base / "text.txt").write_text(TEXT, encoding="utf-8")
    make_texts(base / "texts")
    make_tokenizer(base / "tokenizer.json")
    (base / "codebook").mkdir()
    gray = np.linspace(0, 1, 16, dtype=np.float32)
    codes = np.broadcast_to(gray[:, None, None, None], (16, 4, 4, 3))
    (base / "codebook" / "codebook.npy").write_bytes(as_npy(np.ascontiguousarray(codes)))
    (base / "codebook" / "frames.npy").write_bytes(as_npy(np.zeros((2, 16, 24, 3), np.uint8)))
    make_models(base)
    prepare(config.Data(path=str(base / "text.txt"), tokenizer=str(base / "tokenizer.json")), str(base / "shards"))
    if not run:
        return base
    make_run(base)
    generator = Generator.load(base / "model", config.Mesh(), cache_tokens=64, chunk=16)
    generator.prefill([1, 2, 3, 4, 5, 6]).save(base / "cache")
    return base


def make_texts(directory: Path) -> None:
    """Creates a file of each format that data.path takes."""
    directory.mkdir()
    lines = [json.dumps({"text": f"line {number} é 漢\n" * 5}) for number in range(40)]
    pairs = [json.dumps({"prompt": f"{number} + 1 =", "completion": f" {number + 1}"}) for number in range(200)]
    bases = "".join(f">r{number} x\n{'ACGTN' * 20}\n{'ggatc' * 20}\n" for number in range(20))
    contents = {
        "plain.txt": TEXT.encode(),
        "lines.jsonl": "\n".join(lines).encode() + b"\n",
        "pairs.jsonl": "\n".join(pairs).encode() + b"\n",
        "lines.jsonl.gz": gzip.compress("\n".join(lines).encode(), mtime=0),
        "bases.fa": bases.encode(),
        "bases.fa.gz": gzip.compress(bases.encode(), mtime=0),
        "blocks.fa.gz": bgzf(bases.encode()[: len(bases) // 2]) + bgzf(bases.encode()[len(bases) // 2 :]) + BGZF_END,
    }
    for name, content in contents.items():
        (directory / name).write_bytes(content)
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.table({"text": [f"row {number} é 漢\n" * 5 for number in range(300)]})
    parquet.write_table(table, directory / "rows.parquet", row_group_size=100)
    from test_video import film

    (directory / "film.mp4").write_bytes(film(12))


def bgzf(content: bytes) -> bytes:
    """Returns a gzip member with the subfield BC, as bgzip writes it."""
    member = gzip.compress(content, mtime=0)
    size = len(member) + 8 - 1
    field = (6).to_bytes(2, "little") + b"BC" + (2).to_bytes(2, "little") + size.to_bytes(2, "little")
    return member[:3] + b"\x04" + member[4:10] + field + member[10:]


def make_tokenizer(path: Path) -> None:
    """Creates a byte-level BPE tokenizer like that of GPT-2."""
    level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = level, tokenizers.decoders.ByteLevel()  # pyright: ignore
    special = ["<pad>", "<|endoftext|>"]
    alphabet = level.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.save(str(path))


def make_models(base: Path) -> None:
    """Creates GGUF files, and Hugging Face directories, one of them with a tokenizer and a chat template."""
    write_gguf(FAMILIES / "llama", base / "model.gguf")
    write_gguf(FAMILIES / "gemma3", base / "gemma3.gguf", tokens=False)
    weights.save(weights.load(base / "model.gguf", config.Mesh()), base / "model")
    (base / "model" / "chat_template.jinja").write_text(CHAT, encoding="utf-8")
    settings = {"bos_token": "<|endoftext|>", "eos_token": {"content": "<|im_end|>"}, "chat_template": CHAT}
    (base / "model" / "tokenizer_config.json").write_text(json.dumps(settings))
    for family in sorted(FAMILIES.iterdir()):
        target = base / "families" / family.name
        target.mkdir(parents=True)
        for name in ("config.json", "model.safetensors"):
            shutil.copy(family / name, target)


def small_config(base: Path) -> config.Config:
    """Returns the config of the run."""
    return config.Config(
        name="fuzzed",
        model=config.Model(layers=1, dim=16, heads=2, kv_heads=1, head_dim=8, feed_forward=16),
        data=config.Data(
            path=str(base / "text.txt"), tokenizer=str(base / "tokenizer.json"), seq_len=32, validation=0.3
        ),
        train=config.Train(steps=4, batch_size=2),
        validation=config.Validation(every=4, batches=1),
        checkpoint=config.Checkpoint(every=2, keep=2),
        log=config.Log(every=1, directory=str(base / "runs")),
        stages=(config.Stage(steps=3), config.Stage(steps=1)),
    )


def small_evaluation(base: Path, runs: Path) -> config.Evaluation:
    """Returns the config of an evaluation, whose results are stored in the run."""
    return config.Evaluation(
        name="stored",
        runs=(str(runs / "fuzzed"),),
        tasks=("loss_by_position",),
        lengths=(16, 32),
        samples=2,
        batch_size=1,
        path=str(base / "text.txt"),
    )


def make_run(base: Path) -> None:
    """Trains the run, in two stages with a checkpoint each, and evaluates it."""
    training.train(small_config(base))
    evaluation.evaluate(small_evaluation(base, base / "runs"))
    jax.clear_caches()
