"""Reads what the config section `data` specifies: the tokenizer, and training and validation documents."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from ringattn.config import TASK, Data
from ringattn.data.codebook import learn
from ringattn.data.corpus import Corpus, build_corpus, encode, held_out_digests, split
from ringattn.data.dna import DnaTokenizer
from ringattn.data.shards import Shards, are_shards, open_shards
from ringattn.data.sources import read_documents
from ringattn.data.tasks import questions
from ringattn.data.tokenizer import ByteTokenizer, FileTokenizer, Tokenizer
from ringattn.data.video import load_video

TASK_TOKENS = 2**22
"""Tokens generated per task, for training and validation. With far fewer, a small model memorizes them."""


class Splits(NamedTuple):
    """The training and validation documents of each path of data.path."""

    tokenizer: Tokenizer
    training: list[Corpus]
    """One corpus per path."""
    validation: list[Corpus]
    """One corpus per path."""
    kinds: list[list[str]]
    """Kind of each validation document, per path: `Document.kind`, the directory name of shards, or the task name."""


def read(data: Data, run_directory: Path | None = None) -> Splits:
    """Reads and tokenizes the documents of `data`. Token shards are memory-mapped.

    A tokenizer file or codebook in `run_directory` takes precedence over the tokenizer that `data`
    specifies. Raises ValueError if documents, tokenizer or shards cannot be read or do not match.
    """
    shards, tokenizer = _open(data, run_directory)
    splits = []
    for path in data.paths:
        corpus, digests, kinds = _read_path(path, tokenizer, data, shards)
        name = f"data.path={path!r}"
        held_out = held_out_digests(digests, data.validation, name)
        kinds = [kind for kind, digest in zip(kinds, digests, strict=True) if digest in held_out or not held_out]
        splits.append((*split(corpus, digests, data.validation, tokenizer.unit, name), kinds))
    return Splits(tokenizer, *map(list, zip(*splits, strict=True)))


def read_all(data: Data, run_directory: Path | None = None) -> tuple[list[Corpus], list[list[str]]]:
    """Returns all documents of `data` without a split, one corpus per path, and their kinds; see `read`."""
    shards, tokenizer = _open(data, run_directory)
    corpora, _, kinds = zip(*(_read_path(path, tokenizer, data, shards) for path in data.paths), strict=True)
    return list(corpora), list(kinds)


def _open(data: Data, run_directory: Path | None) -> tuple[dict[str, Shards], Tokenizer]:
    """Opens the paths of `data` that are shards, and loads the tokenizer."""
    shards = {path: open_shards(Path(path).expanduser()) for path in data.paths if are_shards(path)}
    return shards, find_tokenizer(data, list(shards.values()), run_directory)


def _read_path(
    path: str, tokenizer: Tokenizer, data: Data, shards: dict[str, Shards]
) -> tuple[Corpus, list[bytes], list[str]]:
    """Returns the documents of one path, with their digests and kinds."""
    if path in shards:
        shards[path].check(tokenizer, data)
        corpus, digests = shards[path].corpus(tokenizer), shards[path].digests()
        return corpus, digests, [Path(path).name] * len(digests)
    if path.startswith(TASK):
        _, task, *lengths = path.split(":")
        length = int(lengths[0]) if lengths else data.seq_len
        return build_corpus(questions(task, tokenizer, length, max(TASK_TOKENS // length, 64)), tokenizer)
    return build_corpus(encode(read_documents(path, video=tokenizer.name == "video"), tokenizer), tokenizer)


def find_tokenizer(data: Data, shards: Sequence[Shards] = (), run_directory: Path | None = None) -> Tokenizer:
    """Returns the tokenizer of `data`; a copy of its file in `run_directory` takes precedence.

    For 'video', the codebook is read from `run_directory` or `shards`, or else learned from the videos of `data`.
    """
    if data.tokenizer != "video":
        name = data.tokenizer
        if run_directory is not None and name not in ("bytes", "dna"):
            copy = run_directory / ("codebook.npy" if name.endswith(".npy") else "tokenizer.json")
            name = str(copy) if copy.is_file() else name
        return load_tokenizer(name, data.frame_size)
    directories = [] if run_directory is None else [run_directory]
    directories += [opened.directory for opened in shards if opened.tokenizer == "video"]
    for directory in directories:
        if (directory / "codebook.npy").is_file():
            return load_video(str(directory / "codebook.npy"), data.frame_size)
    videos = [path for path in data.paths if not are_shards(path)]
    if not videos:
        raise ValueError(
            f"data.path={data.path!r} has no video; use the --data.tokenizer that its shards were written with"
        )
    return learn([partial(read_documents, path, video=True) for path in videos], data.frame_size, data.validation)


def load_tokenizer(name: str, frame_size: tuple[int, ...] = ()) -> Tokenizer:
    """Loads the tokenizer 'bytes' or 'dna', or the codebook.npy or tokenizer.json at path `name`.

    `frame_size` applies only to a codebook. Raises ValueError if the file is missing or invalid.
    """
    if name in ("bytes", "dna"):
        return ByteTokenizer() if name == "bytes" else DnaTokenizer()
    return load_video(name, frame_size) if name.endswith(".npy") else FileTokenizer(name)
