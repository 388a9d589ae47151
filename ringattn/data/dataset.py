"""Reads what the config section `data` specifies: the tokenizer, and training and validation documents."""

from collections.abc import Sequence
from functools import partial
from itertools import compress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ringattn.config import TASK, Data
from ringattn.data.codebook import learn
from ringattn.data.corpus import Corpus, Documents, build_corpus, encode
from ringattn.data.dna import DnaTokenizer
from ringattn.data.file_tokenizer import FileTokenizer
from ringattn.data.held_out import describe_copies, describe_split, first_copies, held_out_lengths, split
from ringattn.data.questions import questions
from ringattn.data.shards import Shards, are_shards, open_shards
from ringattn.data.sources import read_documents
from ringattn.data.tokenizer import ByteTokenizer, Tokenizer
from ringattn.data.video import load_video
from ringattn.runs.files import expanded

TASK_TOKENS = 2**22
"""Tokens generated per task, for training and validation. With far fewer, a small model memorizes them."""


class Splits(NamedTuple):
    """The training and validation documents of each path of data.path."""

    tokenizer: Tokenizer
    training: list[Corpus]
    """One corpus per path, except for paths with only duplicates of documents of other paths."""
    validation: list[Corpus]
    """One corpus per corpus of `training`."""
    kinds: list[list[str]]
    """Kind of each validation document, per path: `Document.kind`, the directory name of shards, or the task name."""
    notes: list[str]
    """Lines for the display: size of each side, and duplicate documents."""


def read(data: Data, run_directory: Path | None = None, tokenizer: Tokenizer | None = None) -> Splits:
    """Reads and tokenizes the documents of `data`. Token shards are memory-mapped.

    `tokenizer`, or else a tokenizer file or codebook in `run_directory`, takes precedence over the tokenizer that
    `data` specifies. Identical documents are used once. Raises ValueError if documents, tokenizer or shards cannot be
    read or do not match, or if `data.mixture` includes a path whose documents are all also in other paths.
    """
    shards, tokenizer = _open(data, run_directory, tokenizer)
    sources = [_read_path(path, tokenizer, data, shards) for path in data.paths]
    kept, kept_of = first_copies([source.digests for source in sources])
    splits, notes = [], []
    for path, source, chosen in zip(data.paths, sources, kept, strict=True):
        if chosen.any():
            corpus, name = source.corpus.take(chosen), f"data.path={path!r}"
            options = data.validation, tokenizer.unit, name, corpus.masked_prefixes > 0
            held_out = held_out_lengths(corpus.lengths, source.digests[chosen], *options)
            training, validation = split(corpus, held_out)
            kinds = [kind for kind, count in zip(compress(source.kinds, chosen), held_out, strict=True) if count]
            splits.append((training, validation, kinds))
            notes.append(describe_split(name, [training], [validation], held_out.size, *options[:2]))
        elif data.mixture is not None:
            problem = f"data.path={path!r}: all of its {chosen.size:,} documents are also in other paths"
            raise ValueError(f"{problem}, so data.mixture has nothing to draw from it; remove the path and its share")
    training, validation, kinds = map(list, zip(*splits, strict=True))
    documents = int(sum(map(np.count_nonzero, kept)))
    total = describe_split("data", training, validation, documents, data.validation, tokenizer.unit)
    notes = [total, *(notes if len(notes) > 1 else []), *describe_copies(data.paths, sources, kept_of)]
    return Splits(tokenizer, training, validation, kinds, notes)


def read_all(data: Data, tokenizer: Tokenizer | None = None) -> tuple[list[Corpus], list[list[str]]]:
    """Returns all documents of `data` without a split, one corpus per path, and their kinds; see `read`."""
    shards, tokenizer = _open(data, None, tokenizer)
    sources = [_read_path(path, tokenizer, data, shards) for path in data.paths]
    return [source.corpus for source in sources], [source.kinds for source in sources]


def _open(
    data: Data, run_directory: Path | None, tokenizer: Tokenizer | None = None
) -> tuple[dict[str, Shards], Tokenizer]:
    """Opens the paths of `data` that are shards, and loads the tokenizer unless it is given."""
    shards = {path: open_shards(expanded(path)) for path in data.paths if are_shards(path)}
    return shards, tokenizer or find_tokenizer(data, list(shards.values()), run_directory)


def _read_path(path: str, tokenizer: Tokenizer, data: Data, shards: dict[str, Shards]) -> Documents:
    """Returns the documents of one path."""
    if path in shards:
        shards[path].check(tokenizer, data)
        return shards[path].read(tokenizer)
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
