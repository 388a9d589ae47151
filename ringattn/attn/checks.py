"""The arguments of `attention` and `shard_attention`, and their checks. Each check raises a ValueError with a fix."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ringattn.attn.choices import STRATEGIES
from ringattn.attn.kernels.registry import choose_kernel
from ringattn.attn.mask import Mask

REDUCE_DTYPES = ("bfloat16", "float32")
"""Excludes float16, because gradients can overflow."""
Axis = str | tuple[str, str]
TokenIds = Int[Array, "B L"] | tuple[Int[Array, "B L"], Int[Array, "B M"]] | None
"""One id per token: a single array for queries and keys, or a pair (queries, keys)."""


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
        names = axis_names(self.axis)  # a list of names, as from a JSON file, could not be hashed
        object.__setattr__(self, "axis", names[0] if len(names) == 1 else names)
        for name, x in {"scale": self.scale, "soft_cap": self.soft_cap}.items():
            object.__setattr__(self, name, None if x is None else float(x))  # settings are hashed; arrays cannot be
        if self.strategy not in STRATEGIES:
            raise ValueError(f"strategy={self.strategy!r} must be one of {_quoted(STRATEGIES)}")
        choose_kernel(self.kernel)
        if not 1 <= len(self.axes) <= 2 or len(set(self.axes)) < len(self.axes):
            raise ValueError(f"axis={self.axis!r} must be one mesh axis or two different ones, (outer, inner)")
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


class Extras(NamedTuple):
    """The optional arrays."""

    positions: TokenIds
    segment_ids: TokenIds
    sinks: Float[Array, " H"] | None
    slopes: Float[Array, " H"] | None
    span_ids: TokenIds


def axis_names(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """Normalizes None, a name or a tuple of names to a tuple."""
    if entry is None:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


def check_arrays(query: Array, key: Array, value: Array, extras: Extras) -> None:
    """Raises ValueError if shapes or dtypes are invalid or inconsistent."""
    if query.ndim != 4 or key.ndim != 4 or value.ndim != 4:
        raise ValueError(f"query, key, value must be [B, L, heads, D], not {query.shape}, {key.shape}, {value.shape}")
    (B, _, H, D), (M, G) = query.shape, key.shape[1:3]
    if key.shape != (B, M, G, D) or value.shape[:3] != (B, M, G):
        raise ValueError(
            f"query {query.shape}, key {key.shape}, value {value.shape} must agree in B, key with query also in D, "
            "value with key also in length and heads"
        )
    if G == 0 or H % G:
        raise ValueError(f"H={H} query heads must be a multiple of G={G} K/V heads; use H={max(H // max(G, 1), 1) * G}")
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(f"query, key, value must have one dtype, not {query.dtype}, {key.dtype}, {value.dtype}")
    if query.dtype not in (jnp.float32, jnp.bfloat16, jnp.float64):
        fix = "cast query, key and value with .astype('float32') or .astype('bfloat16')"
        raise ValueError(f"query.dtype={query.dtype} must be float32 or bfloat16 (float64 with jax_enable_x64); {fix}")
    for name, x in {"sinks": extras.sinks, "slopes": extras.slopes}.items():
        if x is not None and (x.shape != (H,) or not jnp.issubdtype(x.dtype, jnp.floating)):
            raise ValueError(f"{name} must be float ({H},), one per query head, not {x.dtype} {x.shape}")
    ids = {"segment_ids": extras.segment_ids, "span_ids": extras.span_ids, "positions": extras.positions}
    for name, x in ids.items():
        _check_ids(name, x, query.shape[:2], key.shape[:2])


def _check_ids(name: str, ids: TokenIds, q_shape: tuple[int, ...], kv_shape: tuple[int, ...]) -> None:
    if ids is None:
        return
    is_pair = isinstance(ids, tuple) and len(ids) == 2 and all(x is not None for x in ids)
    if not is_pair and (isinstance(ids, tuple | list) or q_shape != kv_shape):
        raise ValueError(f"{name} must be a pair of int32 arrays, queries {q_shape} and keys {kv_shape}")
    for x, shape in zip(ids_pair(ids), (q_shape, kv_shape), strict=True):
        if x is not None and (x.shape != shape or x.dtype != jnp.int32):
            raise ValueError(f"{name} must be int32 {shape}, one per token, not {x.dtype} {x.shape}")


def ids_pair(ids: TokenIds) -> tuple[Int[Array, "B L"], Int[Array, "B M"]] | tuple[None, None]:
    """Returns (ids of the queries, ids of the keys)."""
    if ids is None:
        return None, None
    return ids if isinstance(ids, tuple) else (ids, ids)


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))
