"""Reads and writes safetensors files (https://huggingface.co/docs/safetensors, format of version 0.8).

A file is the length of its header (8 bytes, little-endian), the header (a JSON object: dtype, shape and offsets of each
tensor) and the data. Files are not trusted: the header must describe exactly the bytes that follow it.
"""

import json
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ringattn.weights.tensors import DTYPES, Tensor, mapped
from ringattn.weights.untrusted import MAX_JSON_BYTES, file_inside, parse_object, read_object, shortened

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Our names of the dtypes that can be read."""
ITEM_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2}
ITEM_BYTES |= {"I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8}
MAX_DIMS = 8


def open_directory(directory: Path) -> dict[str, Tensor]:
    """Returns the tensors of model.safetensors, or of the files that model.safetensors.index.json names.

    Raises ValueError, with a fix, if files are missing or damaged or do not match the index.
    """
    single = file_inside(directory, SINGLE)
    if single is not None:
        return open_file(single)
    index = file_inside(directory, INDEX)
    if index is None:
        raise ValueError(_no_weights(directory))
    return _open_shards(directory, index)


def _no_weights(directory: Path) -> str:
    found = sorted(path.name for path in directory.iterdir() if path.suffix in (".bin", ".safetensors", ".pt", ".pth"))
    if any(name.startswith("pytorch_model") for name in found):
        convert = "transformers.AutoModelForCausalLM.from_pretrained(DIRECTORY).save_pretrained(NEW_DIRECTORY)"
        problem = "has its weights only in pytorch_model.bin, a pickle, which can run any code when it is opened"
        return f"{directory} {problem}; if you trust it, convert it to safetensors in Python with {convert}"
    files = f" (it has {', '.join(found[:8])})" if found else ""
    return f"{directory} has neither {SINGLE} nor {INDEX}{files}; download the model again"


def _open_shards(directory: Path, index: Path) -> dict[str, Tensor]:
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: weight_map must map names of tensors to names of files; download it again")
    tensors: dict[str, Tensor] = {}
    for name, file in _shards(directory, list(weight_map.values())).items():
        for tensor_name, tensor in open_file(file).items():
            if weight_map.get(tensor_name) != name:
                where = weight_map.get(tensor_name)
                problem = f"contains the tensor {shortened(tensor_name)}, which {INDEX} assigns to {shortened(where)}"
                raise ValueError(f"{file} {problem}; download the model again")
            tensors[tensor_name] = tensor
    absent = [name for name in weight_map if name not in tensors]
    if absent:
        file = directory / weight_map[absent[0]]
        more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
        problem = f"lacks the tensor {shortened(absent[0])}{more}, which {INDEX} assigns to it"
        raise ValueError(f"{file} {problem}; download the model again")
    return tensors


def _shards(directory: Path, names: list[Any]) -> dict[str, Path]:
    """Returns the path of each file that an index names. Raises ValueError if one is missing or not a plain name."""
    shards: dict[str, Path] = {}
    for name in names:
        if isinstance(name, str) and name in shards:
            continue
        file = file_inside(directory, name)
        if file is None:
            missing = f"{directory / name} is missing, but {INDEX} names it"
            raise ValueError(f"{missing}; download it into {directory}, or download the model again")
        shards[name] = file
    return shards


def open_file(path: Path) -> dict[str, Tensor]:
    """Returns the tensors of one file. Raises ValueError if the header does not describe exactly the data."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_JSON_BYTES):
                problem = f"has {size:,} bytes, too few for its header of {length:,} bytes"
                raise ValueError(f"{path} {problem}: it is truncated or not a safetensors file; download it again")
            content = file.read(length)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); make it readable") from None
    try:
        header = parse_object(content)
        header.pop("__metadata__", None)
        spans = {name: _span(name, entry) for name, entry in header.items()}
        _check_covers(spans, size - 8 - length)
    except ValueError as error:
        raise ValueError(f"{path} has an invalid header ({error}); download it again") from None
    return {name: _tensor(path, header[name], 8 + length + begin) for name, (begin, _) in spans.items()}


def _span(name: str, entry: Any) -> tuple[int, int]:
    """Returns begin and end of the data of a tensor. Raises ValueError if its entry contradicts itself."""

    def are_sizes(value: Any) -> bool:
        return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)

    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {shortened(name)} must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise ValueError(f"tensor {shortened(name)} has the unknown dtype {shortened(dtype)}")
    if not are_sizes(shape) or len(shape) > MAX_DIMS:
        raise ValueError(f"the shape of tensor {shortened(name)} must be a list of at most {MAX_DIMS} sizes")
    if not are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"data_offsets of tensor {shortened(name)} must be two positions")
    begin, end = offsets
    expected = math.prod(shape) * ITEM_BYTES[dtype]
    if end - begin != expected:
        stated = f"tensor {shortened(name)} of shape {shortened(shape)} and dtype {dtype}"
        raise ValueError(f"{stated} takes {expected} bytes, not {end - begin}")
    return begin, end


def _check_covers(spans: dict[str, tuple[int, int]], size: int) -> None:
    """Raises ValueError unless the spans cover `size` bytes without gaps and without overlap."""
    position = 0
    ordered = sorted(spans.items(), key=lambda item: item[1])
    for name, (_, end) in ordered:
        if end > size:
            raise ValueError(f"tensor {shortened(name)} ends at byte {end} of the data, which have {size} bytes")
    for name, (begin, end) in ordered:
        if begin != position:
            relation = "overlaps the one before it" if begin < position else "leaves a gap before it"
            raise ValueError(f"tensor {shortened(name)} at byte {begin} {relation}, which ends at byte {position}")
        position = end
    if position != size:
        raise ValueError(f"the tensors end at byte {position} of the data, which have {size} bytes")


def _tensor(path: Path, entry: dict[str, Any], offset: int) -> Tensor:
    shape = tuple(entry["shape"])
    stored: str = entry["dtype"]
    dtype = NAMES.get(stored, stored)
    return Tensor(shape, dtype, path, mapped(path, dtype, offset, shape))


def write_file(
    path: Path, shapes: dict[str, tuple[int, ...]], dtype: str, content: Iterable[np.ndarray]
) -> Iterator[str]:
    """Writes float32 tensors as `dtype`; yields the name of each after it is written. Holds one tensor at a time.

    `content` has the tensors in the order of `shapes`. Raises OSError.
    """
    stored = {name: code for code, name in NAMES.items()}[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers requires it
    position = 0
    for name, shape in shapes.items():
        end = position + math.prod(shape) * ITEM_BYTES[stored]
        header[name] = {"dtype": stored, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # aligns the data
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for (name, shape), array in zip(shapes.items(), content, strict=True):
            assert array.shape == shape, (name, array.shape, shape)
            file.write(np.ascontiguousarray(array.astype(DTYPES[dtype])).view(np.uint8).data)
            yield name
        file.flush()
        os.fsync(file.fileno())
