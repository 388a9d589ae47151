"""From data.path to tokens: the tokenizer, and for each path what is for training and what for validation."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from ringattn.config import TASK, Data
from ringattn.data.codebook import learn
from ringattn.data.corpus import Corpus, encode, gather, held_out, split
from ringattn.data.dna import DnaTokenizer
from ringattn.data.shards import Shards, are_shards, open_shards
from ringattn.data.sources import read_documents
from ringattn.data.tasks import questions
from ringattn.data.tokenizer import ByteTokenizer, FileTokenizer, Tokenizer
from ringattn.data.video import load_video

TASK_TOKENS = 2**22
"""Tokens that a task makes, to train on and to hold out: so many that a small model does not learn them by heart."""


class Sides(NamedTuple):
    tokenizer: Tokenizer
    training: list[Corpus]
    """One for each of data.path."""
    validation: list[Corpus]
    kinds: list[list[str]]
    """What each document of validation is one of: the ending of its file, or the file's or the shards' name."""


def read(data: Data, kept: Path | None = None) -> Sides:
    """Reads and tokenises all that `data` names, or maps the shards where that has been done before.

    `kept` is a folder with the files of the tokenizer of the same run, which are read in the place of those that
    `data` names, and of learning a codebook anew. Raises ValueError where data, tokenizer or shards cannot be read or
    do not go together.
    """
    opened = {path: open_shards(Path(path).expanduser()) for path in data.paths if are_shards(path)}
    tokenizer = find_tokenizer(data, list(opened.values()), kept)
    sides = []
    for path in data.paths:
        corpus, digests, kinds = _source(path, tokenizer, data, opened)
        held = held_out(digests, data.validation)
        kinds = [kind for kind, digest in zip(kinds, digests, strict=True) if digest in held or not held]
        sides.append((*split(corpus, digests, data.validation, tokenizer.unit, f"data.path={path!r}"), kinds))
    return Sides(tokenizer, *map(list, zip(*sides, strict=True)))


def read_all(data: Data, kept: Path | None = None) -> tuple[list[Corpus], list[list[str]]]:
    """All documents that `data` names, for training or not, and the kind of each; otherwise as `read`."""
    opened = {path: open_shards(Path(path).expanduser()) for path in data.paths if are_shards(path)}
    tokenizer = find_tokenizer(data, list(opened.values()), kept)
    corpora, _, kinds = zip(*(_source(path, tokenizer, data, opened) for path in data.paths), strict=True)
    return list(corpora), list(kinds)


def _source(
    path: str, tokenizer: Tokenizer, data: Data, opened: dict[str, Shards]
) -> tuple[Corpus, list[bytes], list[str]]:
    """Of one path the documents, their digests and kinds."""
    if path in opened:
        opened[path].check(tokenizer, data)
        corpus, digests = opened[path].corpus(tokenizer), opened[path].digests()
        return corpus, digests, [Path(path).name] * len(digests)
    if path.startswith(TASK):
        _, task, *given = path.split(":")
        length = int(given[0]) if given else data.seq_len
        return gather(questions(task, tokenizer, length, max(TASK_TOKENS // length, 64)), tokenizer)
    return gather(encode(read_documents(path, video=tokenizer.name == "video"), tokenizer), tokenizer)


def find_tokenizer(data: Data, opened: Sequence[Shards] = (), kept: Path | None = None) -> Tokenizer:
    """The tokenizer of `data`, from the file that is `kept` if there is one; for 'video' that of shards, or learned."""
    if data.tokenizer != "video":
        own = None if kept is None else kept / ("codebook.npy" if data.tokenizer.endswith(".npy") else "tokenizer.json")
        there = own is not None and data.tokenizer not in ("bytes", "dna") and own.is_file()
        return load_tokenizer(str(own) if there else data.tokenizer, data.frame_size)
    folders = ([] if kept is None else [kept]) + [shards.folder for shards in opened if shards.tokenizer == "video"]
    there = [folder / "codebook.npy" for folder in folders if (folder / "codebook.npy").is_file()]
    if there:
        return load_video(str(there[0]), data.frame_size)
    raw = [path for path in data.paths if not are_shards(path)]
    if not raw:
        raise ValueError(
            f"data.path={data.path!r} holds no video: use the --data.tokenizer that its shards were made with"
        )
    return learn([partial(read_documents, path, video=True) for path in raw], data.frame_size, data.validation)


def load_tokenizer(name: str, frame_size: tuple[int, ...] = ()) -> Tokenizer:
    """The tokenizer called 'bytes' or 'dna', or that of a codebook.npy or a tokenizer.json at path `name`.

    `frame_size` is for a codebook alone. Raises ValueError if there is no such file or it cannot serve.
    """
    if name in ("bytes", "dna"):
        return ByteTokenizer() if name == "bytes" else DnaTokenizer()
    return load_video(name, frame_size) if name.endswith(".npy") else FileTokenizer(name)
