"""Tensors in a file: shape, dtype, and a function that reads a part of them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
from jaxtyping import Float

Index = tuple[slice, ...]
"""One slice per dim."""

DTYPES: dict[str, type] = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
"""The dtypes that convert to float32 without rounding."""


@dataclass(frozen=True)
class Tensor:
    """A tensor in a file. Nothing is read before `read`."""

    shape: tuple[int, ...]
    dtype: str
    """float32, float16 or bfloat16; the name of a quantization in GGUF files; another name if it cannot be read."""
    file: Path
    read: Callable[[Index], Float[np.ndarray, "..."]]
    """Returns the part of the tensor at an index, in float32."""


def mapped(file: Path, dtype: str, offset: int, shape: tuple[int, ...]) -> Callable[[Index], np.ndarray]:
    """Returns the reader of a tensor that is stored at `offset`. Each call maps the tensor and unmaps it."""

    def read(index: Index) -> np.ndarray:
        if 0 in shape:  # which cannot be mapped
            return np.zeros(shape, np.float32)[index]
        return np.memmap(file, DTYPES[dtype], "r", offset, shape)[index].astype(np.float32)

    return read
