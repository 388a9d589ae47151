"""The arguments of `attention` and `shard_attention` that are not arrays, and their checks."""

import math
import reprlib
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Real
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from ringattn.attn.choices import STRATEGIES
from ringattn.attn.kernels.registry import check_kernel_name
from ringattn.attn.mask import Mask

REDUCE_DTYPES = ("bfloat16", "float32")
"""Excludes float16, because gradients can overflow."""
Axis = str | tuple[str, str]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The arguments that are not arrays. Raises ValueError for unknown names and for inconsistent values."""

    mask: Mask
    layout: str
    strategy: str
    axis: Axis
    scale: float | None
    soft_cap: float | None
    kernel: str
    reduce_dtype: str | None

    def __post_init__(self):
        if not isinstance(self.mask, Mask):
            rule = "a ringattn.Mask: Mask() is causal, Mask(causal=False) is not"
            fix = "instead of an array of token pairs, use its window or chunk, segment_ids or span_ids"
            raise ValueError(f"mask={shown(self.mask)} must be {rule}; {fix}")
        names = axis_names(self.axis) if isinstance(self.axis, str | tuple | list) else ()
        if not 1 <= len(names) <= 2 or not all(isinstance(x, str) for x in names) or len(set(names)) < len(names):
            raise ValueError(f"axis={self.axis!r} must be one mesh axis or two different ones, (outer, inner)")
        # Settings are hashed, and lists (as from a JSON file) and arrays are not hashable.
        object.__setattr__(self, "axis", names[0] if len(names) == 1 else names)
        for name, x in {"scale": self.scale, "soft_cap": self.soft_cap}.items():
            object.__setattr__(self, name, None if x is None else _number(name, x))
        if self.strategy not in STRATEGIES:
            raise ValueError(f"strategy={self.strategy!r} must be one of {_quoted(STRATEGIES)}")
        check_kernel_name(self.kernel)
        if self.strategy == "usp" and len(self.axes) == 1:
            fix = "use axis=(outer, inner), or strategy='ring' or 'ulysses', which take one axis"
            raise ValueError(f"axis={self.axis!r} must be a pair for strategy='usp'; {fix}")
        if self.soft_cap is not None and self.soft_cap <= 0:
            raise ValueError(f"soft_cap={self.soft_cap} must be positive; use None for no cap")
        if self.reduce_dtype is not None and self.reduce_dtype not in REDUCE_DTYPES:
            raise ValueError(f"reduce_dtype={self.reduce_dtype!r} must be one of {_quoted(REDUCE_DTYPES)}, or None")
        if self.reduce_dtype is not None and self.strategy == "ulysses":
            fix = "use None: its all-to-all sends gradients in query's dtype"
            raise ValueError(f"reduce_dtype={self.reduce_dtype!r} does not apply to strategy='ulysses'; {fix}")

    @property
    def axes(self) -> tuple[str, ...]:
        """The mesh axes that `axis` names."""
        return axis_names(self.axis)


def axis_names(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """Normalizes None, a name or a tuple of names to a tuple."""
    if entry is None:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


def _number(name: str, x: Any) -> float:
    """Returns a Python float. Raises ValueError unless x is a finite number that is known at trace time."""
    if isinstance(x, Tracer):
        fix = "multiply query by it and use scale=1.0" if name == "scale" else "make it a static argument of jax.jit"
        raise ValueError(f"{name}={shown(x)} must be a Python number, not a traced array; {fix}")
    number = x.item() if isinstance(x, np.ndarray | np.generic | jax.Array) and x.ndim == 0 else x
    if not isinstance(number, Real) or isinstance(number, bool) or not math.isfinite(number):
        raise ValueError(f"{name}={shown(x)} must be a finite number; use None for the default")
    return float(number)


def shown(x: Any) -> str:
    """Formats an argument for a message. Shows only dtype and shape of an array."""
    return f"{x.dtype} {x.shape}" if isinstance(x, np.ndarray | jax.Array) and x.ndim > 0 else reprlib.repr(x)


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))
