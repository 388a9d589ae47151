"""Saves a model as a Hugging Face directory, which transformers loads."""

import json
import math
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from ringattn.runs.files import complete_directory, expanded
from ringattn.weights.huggingface_config import write_config
from ringattn.weights.loaded import Loaded
from ringattn.weights.loading import Advance
from ringattn.weights.names import HUGGING_FACE, Rule, letter_sizes, rules
from ringattn.weights.placement import Sizes, by_path, check_addressable, stored_names, stored_shape, stored_tensors
from ringattn.weights.safetensors_files import INDEX, SINGLE, write_file
from ringattn.weights.tensors import DTYPES

MAX_FILE_BYTES = 5 * 10**9
"""Maximum number of bytes of tensors per file, unless a single tensor is larger."""


def save(loaded: Loaded, path: str | Path, advance: Advance = lambda done, total: None) -> None:
    """Writes config.json, safetensors files, generation_config.json and the files of the tokenizer to `path`.

    Tensors get the dtype of the files that the model was loaded from, in which they are exact; those of a run and of a
    GGUF file are float32. `path` appears once it is complete. `advance` is called after each tensor.

    Raises ValueError, with a fix, if `path` exists and is not an empty directory, if it cannot be written, if the
    parameters are sharded over several processes, or if transformers has no model class for `loaded.config`.
    """
    directory = check_target(path)
    check_addressable(loaded.params, "weights.save")
    model, details = loaded.config, loaded.details
    content = write_config(model, details.context, details.dtype) | details.token_ids
    sizes, chosen = letter_sizes(model), rules(HUGGING_FACE, model)
    shapes = {name: stored_shape(rule, sizes) for rule in chosen for name in stored_names(rule, model.layers)}
    files = _split(shapes, np.dtype(DTYPES[details.dtype]).itemsize)
    with complete_directory(directory, "free disk space, or use another directory") as temporary:
        tensors = _tensors(loaded, chosen, sizes)
        total, done = sum(map(math.prod, shapes.values())), 0
        for file, part in files.items():
            for name in write_file(temporary / file, part, details.dtype, islice(tensors, len(part))):
                done += math.prod(shapes[name])
                advance(4 * done, 4 * total)
        texts = {"config.json": json.dumps(content, indent=2).encode()} | details.files
        if len(files) > 1:
            weight_map = {name: file for file, part in files.items() for name in part}
            bytes_in_all = total * np.dtype(DTYPES[details.dtype]).itemsize
            index = {"metadata": {"total_size": bytes_in_all}, "weight_map": weight_map}
            texts[INDEX] = json.dumps(index, indent=2).encode()
        for name, text in texts.items():
            (temporary / name).write_bytes(text)


def check_target(path: str | Path) -> Path:
    """Returns `path` as a directory to create. Raises ValueError if something is there."""
    directory = expanded(path)
    try:
        if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
            kind = "is not empty" if directory.is_dir() else "is a file"
            raise ValueError(f"{directory} {kind}; use a new directory, or remove it")
    except OSError as error:
        raise ValueError(f"cannot write to {directory} ({error.strerror}); use another directory") from None
    return directory


def _tensors(loaded: Loaded, chosen: tuple[Rule, ...], sizes: Sizes) -> Iterator[np.ndarray]:
    """Yields all tensors in the order of the rules, layer by layer within a rule."""
    params = by_path(loaded.params)
    for rule in chosen:
        yield from stored_tensors(rule, params[rule.path], sizes)


def _split(shapes: dict[str, tuple[int, ...]], item_bytes: int) -> dict[str, dict[str, tuple[int, ...]]]:
    """Returns the shapes of the tensors of each file, in order, with at most MAX_FILE_BYTES per file."""
    parts: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, shape in shapes.items():
        size += math.prod(shape) * item_bytes
        if size > MAX_FILE_BYTES and parts[-1]:
            parts.append({})
            size = math.prod(shape) * item_bytes
        parts[-1][name] = shape
    if len(parts) == 1:
        return {SINGLE: parts[0]}
    return {f"model-{number:05}-of-{len(parts):05}.safetensors": part for number, part in enumerate(parts, 1)}
