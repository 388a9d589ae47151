"""Opens a Hugging Face directory or a GGUF file: config, names and shapes are checked before any tensor is read."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ringattn import config
from ringattn.weights.gguf_config import ROPE_FREQUENCIES, read_metadata
from ringattn.weights.gguf_file import MAGIC, can_dequantize, open_gguf
from ringattn.weights.gguf_tokenizer import generation_files, token_ids, tokenizer_files
from ringattn.weights.huggingface_config import TOKEN_IDS, read_config
from ringattn.weights.matching import check_tensors
from ringattn.weights.names import HUGGING_FACE, Rule, gguf_rules, letter_sizes, rules
from ringattn.weights.safetensors_files import open_directory
from ringattn.weights.tensors import DTYPES, Tensor
from ringattn.weights.untrusted import MAX_JSON_BYTES, file_inside, read_object, shortened

GENERATION = "generation_config.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
TOKENIZER_FILES += ("vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json")
"""Files of a Hugging Face directory that are copied when the model is saved, besides generation_config.json."""
CHAT_FILES = ("tokenizer_config.json", "chat_template.jinja", GENERATION)
"""Files that a run stores besides tokenizer.json, if the checkpoint that it starts from has them."""


@dataclass(frozen=True)
class Details:
    """Content of a Hugging Face directory, except for the model and its parameters."""

    context: int
    """Context length: max_position_embeddings."""
    dtype: str = "float32"
    """Dtype in which the tensors are stored."""
    token_ids: dict[str, Any] = field(default_factory=dict)
    """bos_token_id, eos_token_id and pad_token_id, as in config.json."""
    files: dict[str, bytes] = field(default_factory=dict, repr=False)
    """Contents of generation_config.json and of the files of the tokenizer, by name."""
    no_tokenizer: str = ""
    """Reason why `files` has no tokenizer.json."""

    def end_ids(self) -> frozenset[int]:
        """Returns the ids that end an answer, as transformers does: those of generation_config.json come first."""
        content = json.loads(self.files.get(GENERATION, b"{}"))
        found = content.get("eos_token_id", self.token_ids.get("eos_token_id"))
        return frozenset(number for number in (found if isinstance(found, list) else [found]) if type(number) is int)


@dataclass(frozen=True)
class Source:
    """A checked checkpoint, whose tensors have not been read."""

    path: Path
    model: config.Model
    """The vocabulary is set."""
    tensors: dict[str, Tensor]
    rules: tuple[Rule, ...]
    """One rule per parameter."""
    details: Details

    def digest(self) -> str:
        """Returns a hexadecimal digest of all files with tensors, from all of their bytes."""
        digest = hashlib.sha256()
        for path in sorted({tensor.file for tensor in self.tensors.values()}):
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()[:16]

    def check(self, readable: set[str]) -> None:
        """Raises ValueError unless the tensors are those of the model, with dtypes in `readable`."""
        check_tensors(self.path, self.model, self.tensors, self.rules, letter_sizes(self.model), readable)


def is_gguf(path: Path) -> bool:
    """Returns True if the file at `path` begins as a GGUF file, or is named like one."""
    try:
        with path.open("rb") as file:
            return path.suffix == ".gguf" or file.read(4) == MAGIC
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); make it readable") from None


def open_huggingface(directory: Path) -> Source:
    """Opens a Hugging Face directory. Raises ValueError, with a fix, if anything is missing, damaged or unknown."""
    path = file_inside(directory, "config.json")
    if path is None:
        raise ValueError(f"{directory} has no config.json; download the model again")
    content = read_object(path)
    model, context = read_config(content, str(path))
    tensors = open_directory(directory)
    files = read_files(directory)
    details = Details(
        context,
        _common_dtype(tensors),
        _read_token_ids(content, str(path)),
        files,
        ""
        if "tokenizer.json" in files
        else f"{directory} has no tokenizer.json; copy it there from the original model",
    )
    source = Source(directory, model, tensors, rules(HUGGING_FACE, model), details)
    source.check(set(DTYPES))
    return source


def open_gguf_file(path: Path) -> Source:
    """Opens a GGUF file. Raises ValueError: see `open_huggingface`."""
    metadata, tensors = open_gguf(path)
    model, context = read_metadata(metadata, tensors, str(path))
    tensors.pop(ROPE_FREQUENCIES, None)  # which has become part of the config
    try:
        files, reason = tokenizer_files(metadata, str(path)), ""
    except ImportError:
        files, reason = {}, f"{path}: its tokenizer requires the package tokenizers; pip install 'ringattn[weights]'"
    except ValueError as error:
        files, reason = {}, str(error)
    files |= generation_files(metadata, str(path))
    details = Details(context, "float32", token_ids(metadata, str(path)), files, reason)
    source = Source(path, model, tensors, gguf_rules(model), details)
    source.check({name for name in {tensor.dtype for tensor in tensors.values()} if can_dequantize(name)})
    return source


def chat_files(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """Returns those of `files`, contents by name, that a run stores besides tokenizer.json."""
    return {name: files[name] for name in CHAT_FILES if name in files}


def _common_dtype(tensors: dict[str, Tensor]) -> str:
    """Returns the dtype of all tensors; float32, which holds every value, if they differ."""
    dtypes = {tensor.dtype for tensor in tensors.values()}
    return dtypes.pop() if len(dtypes) == 1 else "float32"


def _read_token_ids(content: dict[str, Any], source: str) -> dict[str, Any]:
    found = {name: content[name] for name in TOKEN_IDS if content.get(name) is not None}
    for name, value in found.items():
        ids = value if isinstance(value, list) and name == "eos_token_id" else [value]
        if not all(type(each) is int for each in ids):
            raise ValueError(f"{source}: {name}={shortened(value)} must be a token id; download the file again")
    return found


def read_files(directory: Path) -> dict[str, bytes]:
    """Returns the contents of generation_config.json and of the files of the tokenizer, by name. Raises ValueError."""
    files = {}
    for name in (GENERATION, *TOKENIZER_FILES):
        path = file_inside(directory, name)
        if path is not None:
            if name == GENERATION:
                read_object(path)
            try:
                if path.stat().st_size > MAX_JSON_BYTES:
                    raise ValueError(f"{path} has more than {MAX_JSON_BYTES:,} bytes; download it again")
                files[name] = path.read_bytes()
            except OSError as error:
                raise ValueError(f"{path} cannot be read ({error.strerror}); make it readable") from None
    return files
