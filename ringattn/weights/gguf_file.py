"""Reads GGUF files (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian).

The file is not trusted: every count, length and offset is compared with the size of the file before it is used. The
package `gguf` dequantizes the tensors.
"""

import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ringattn.units import first_line
from ringattn.weights.tensors import Index, Tensor
from ringattn.weights.untrusted import shortened

MAGIC = b"GGUF"
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Formats (module struct) of the types of metadata that have a fixed size."""
_STRING, _ARRAY = 8, 9
_MAX_DIMS = 4
MAX_ITEMS = 2**23
"""Maximum number of items of all arrays of metadata. Vocabularies of 300,000 tokens have 1,500,000. Python takes up to
60 bytes per item, so that without the maximum a file of one-byte items would not fit in memory."""


class GgufFile(NamedTuple):
    """Content of a GGUF file."""

    metadata: dict[str, Any]
    """Numbers, bools, strings, and lists of these."""
    tensors: dict[str, Tensor]


class _Damage(Exception):  # noqa: N818
    """Raised if the file contradicts itself."""


class _Cursor:
    """Reads values of a file one after the other."""

    def __init__(self, data: np.ndarray):
        self.data, self.position, self.items = data, 0, 0

    @property
    def left(self) -> int:
        return self.data.size - self.position

    def take(self, count: int) -> bytes:
        if count > self.left:
            raise _Damage(f"it ends at byte {self.data.size}, before the {count} bytes expected at {self.position}")
        self.position += count
        return self.data[self.position - count : self.position].tobytes()

    def number(self, kind: str) -> Any:
        value = struct.unpack("<" + kind, self.take(struct.calcsize("<" + kind)))[0]
        return float(str(np.float32(value))) if kind == "f" else value  # 1e-05 instead of 9.999999747378752e-06

    def count(self, item_bytes: int) -> int:
        """Returns the number of the items that follow, each of at least `item_bytes`."""
        count = self.number("Q")
        if count * item_bytes > self.left:
            raise _Damage(f"it says that {count} values follow at byte {self.position}, but only {self.left} bytes do")
        return count

    def array_count(self, item_bytes: int) -> int:
        """Returns the number of the items of the array that follows."""
        count = self.count(item_bytes)
        self.items += count
        if self.items > MAX_ITEMS:
            raise _Damage(f"its arrays of metadata have more than {MAX_ITEMS:,} items before byte {self.position}")
        return count

    def string(self) -> str:
        try:
            return self.take(self.count(1)).decode("utf-8")
        except UnicodeDecodeError:
            raise _Damage(f"the text before byte {self.position} is not UTF-8") from None

    def value(self, kind: int) -> Any:
        """Returns a value of metadata of type `kind`."""
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise _Damage(f"a value before byte {self.position} has the unknown type {kind}")
        items = self.number("I")
        if items in _SCALARS:
            size = struct.calcsize("<" + _SCALARS[items])
            count = self.array_count(size)
            return list(struct.unpack(f"<{count}{_SCALARS[items]}", self.take(count * size)))
        if items != _STRING:
            raise _Damage(f"an array before byte {self.position} has items of the unsupported type {items}")
        return [self.string() for _ in range(self.array_count(8))]


def open_gguf(path: Path) -> GgufFile:
    """Returns metadata and tensors. Raises ValueError, with a fix, if the file is damaged or `gguf` is missing."""
    try:
        quantizations = _quantizations()
    except ImportError as error:
        fix = "run pip install 'ringattn[weights]'"
        raise ValueError(f"{path} is a GGUF file, which requires the package gguf; {fix}") from error
    try:
        data = np.memmap(path, np.uint8, "r")
        cursor = _Cursor(data)
        if cursor.take(4) != MAGIC:
            raise _Damage("it does not begin with GGUF")
        version = cursor.number("I")
        if version not in (2, 3):
            raise _Damage(f"its version is {version}; versions 2 and 3 are supported, little-endian")
        tensors, values = cursor.count(24), cursor.number("Q")
        if values * 13 > cursor.left:
            raise _Damage(f"it says that {values} values follow, but only {cursor.left} bytes do")
        metadata = _read_metadata(cursor, values)
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 0 < alignment <= 2**20 or alignment & (alignment - 1):
            raise _Damage(f"general.alignment={shortened(alignment)} must be a power of two")
        entries = _read_entries(cursor, tensors, quantizations)
        start = _aligned(cursor.position, alignment)
        _check_covers(entries, alignment, data.size - start)
        return GgufFile(metadata, {name: entry.tensor(path, start) for name, entry in entries.items()})
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); make it readable") from None
    except (_Damage, ValueError) as error:  # ValueError: an empty file cannot be mapped
        raise ValueError(f"{path} is not a valid GGUF file: {first_line(error)}; download it again") from None


class _Quantization(NamedTuple):
    """A quantization: groups of `items` values, each of `group_bytes` bytes."""

    name: str
    items: int
    group_bytes: int


def _quantizations() -> dict[int, _Quantization]:
    """Returns the quantizations by their number in GGUF files. Raises ImportError without the package gguf."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    return {
        int(kind): _Quantization(GGMLQuantizationType(kind).name, *GGML_QUANT_SIZES[kind]) for kind in GGML_QUANT_SIZES
    }


def can_dequantize(name: str) -> bool:
    """Returns True if the package gguf dequantizes the quantization `name`."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    kind = GGMLQuantizationType[name]
    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def _read_metadata(cursor: _Cursor, count: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for _ in range(count):
        name = cursor.string()
        if name in metadata:
            raise _Damage(f"{shortened(name)} occurs twice")
        metadata[name] = cursor.value(cursor.number("I"))
    return metadata


class _Entry(NamedTuple):
    """Description of a tensor in the header."""

    shape: tuple[int, ...]
    quantization: str
    kind: int
    row_bytes: int
    offset: int

    @property
    def size(self) -> int:
        return math.prod(self.shape[:-1]) * self.row_bytes

    def tensor(self, path: Path, start: int) -> Tensor:
        return Tensor(self.shape, self.quantization, path, _reader(path, self, start + self.offset))


def _read_entries(cursor: _Cursor, count: int, quantizations: dict[int, _Quantization]) -> dict[str, _Entry]:
    """Returns the descriptions of `count` tensors."""
    entries: dict[str, _Entry] = {}
    for _ in range(count):
        name = cursor.string()
        dims = cursor.number("I")
        if not 1 <= dims <= _MAX_DIMS:
            raise _Damage(f"tensor {shortened(name)} has {dims} dims, which must be from 1 to {_MAX_DIMS}")
        shape = tuple(cursor.number("Q") for _ in range(dims))[::-1]  # GGUF lists the innermost dim first
        kind, offset = cursor.number("I"), cursor.number("Q")
        if name in entries:
            raise _Damage(f"tensor {shortened(name)} occurs twice")
        if kind not in quantizations:
            raise _Damage(f"tensor {shortened(name)} has the unknown type {kind}")
        known = quantizations[kind]
        if shape[-1] % known.items:
            rule = f"not a multiple of {known.items} ({known.name})"
            raise _Damage(f"rows of tensor {shortened(name)} have {shape[-1]} values, {rule}")
        entries[name] = _Entry(shape, known.name, kind, shape[-1] // known.items * known.group_bytes, offset)
    return entries


def _check_covers(entries: dict[str, _Entry], alignment: int, size: int) -> None:
    """Raises _Damage unless the tensors fill `size` bytes without overlap, and gaps are those of alignment."""
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].size)):
        if entry.offset != _aligned(end, alignment):
            raise _Damage(
                f"tensor {shortened(name)} begins at byte {entry.offset} of the data, not at {_aligned(end, alignment)}"
            )
        end = entry.offset + entry.size
        if end > size:
            raise _Damage(f"tensor {shortened(name)} ends at byte {end} of the data, which have {size} bytes")
    if size > _aligned(end, alignment):
        raise _Damage(f"the tensors end at byte {end} of the data, which have {size} bytes")


def _aligned(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment


def _reader(path: Path, entry: _Entry, offset: int) -> Callable[[Index], np.ndarray]:
    """Returns the function that dequantizes a part of a tensor to float32. It maps only the rows that it needs."""

    def read(index: Index) -> np.ndarray:
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize

        stored = np.memmap(path, np.uint8, "r", offset, (*entry.shape[:-1], entry.row_bytes))
        with np.errstate(all="ignore"):  # scales of a damaged file may be infinite
            rows = dequantize(np.array(stored[index[:-1]]), GGMLQuantizationType(entry.kind))
        return rows[(..., index[-1])].astype(np.float32)

    return read
