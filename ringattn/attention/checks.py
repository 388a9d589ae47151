"""What attention's arguments must be, globally and inside a shard_map alike; a ValueError says what is wrong."""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from ringattn.attention.local import choose_kernel

STRATEGIES = ("ring", "gather", "ulysses", "usp", "auto")
REDUCE_DTYPES = ("bfloat16", "float16", "float32")
TokenIds = Int[Array, "B L"] | tuple[Int[Array, "B L"], Int[Array, "B M"]] | None
"""A number for every token: one array for queries and keys alike, or a pair, of queries and of keys."""


def axis_names(entry: Any) -> tuple[str, ...]:
    """The mesh axes that an `axis`, or an entry of a spec, names."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def several_devices(axis: str | tuple[str, str]) -> str | tuple[str, str]:
    """The axis without a part of one device, inside a shard_map: a ring of one ring, and rings of one, are a ring."""
    names = axis_names(axis)
    several = [name for name in names if lax.axis_size(name) > 1] or [names[0]]
    return axis if len(several) == len(names) else several[0]


def check_settings(
    strategy: str, axes: tuple[str, ...], kernel: str, soft_cap: float | None, reduce_dtype: Any
) -> None:
    """Raises ValueError on an unknown strategy or kernel, on axes that do not suit it, on options that mean nothing."""
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy={strategy!r} is none of {', '.join(map(repr, STRATEGIES))}")
    choose_kernel(kernel)
    if not 1 <= len(axes) <= 2 or len(set(axes)) < len(axes):
        raise ValueError(f"axis={axes} must be one mesh axis or two different ones, (outer, inner)")
    if strategy == "usp" and len(axes) == 1:
        cure = "'ring' and 'ulysses' need one axis"
        raise ValueError(f"strategy='usp' needs axis=(outer, inner), not {axes[0]!r}; {cure}")
    if soft_cap is not None and soft_cap <= 0:
        raise ValueError(f"soft_cap={soft_cap} must be positive; None for no cap")
    if reduce_dtype is not None and reduce_dtype not in REDUCE_DTYPES:
        raise ValueError(f"reduce_dtype={reduce_dtype!r} is none of {', '.join(map(repr, REDUCE_DTYPES))}; or None")
    if reduce_dtype is not None and strategy == "ulysses":
        cure = "leave it out: an exchange sends them in query's dtype"
        raise ValueError(f"reduce_dtype={reduce_dtype!r}: strategy='ulysses' sums no gradients on the wire; {cure}")


def check_arrays(query: Any, key: Any, value: Any, per_head: dict[str, Any]) -> None:
    """Raises ValueError, with both values and a cure, where shapes or dtypes do not fit each other."""
    if query.ndim != 4 or key.ndim != 4 or value.ndim != 4:
        raise ValueError(f"query, key, value must be [B, L, heads, D], not {query.shape}, {key.shape}, {value.shape}")
    (B, _, H, D), (M, G) = query.shape, key.shape[1:3]
    if key.shape != (B, M, G, D) or value.shape[:3] != (B, M, G):
        raise ValueError(
            f"query {query.shape}, key {key.shape}, value {value.shape} must agree in B, key with query also in D, "
            "value with key also in length and heads"
        )
    if G == 0 or H % G:
        raise ValueError(f"H={H} query heads must be a multiple of G={G} K/V heads: use H={max(H // max(G, 1), 1) * G}")
    if not (query.dtype == key.dtype == value.dtype and jnp.issubdtype(query.dtype, jnp.floating)):
        raise ValueError(f"query, key, value must be of one float dtype, not {query.dtype}, {key.dtype}, {value.dtype}")
    for name, x in per_head.items():
        if x is not None and (x.shape != (H,) or not jnp.issubdtype(x.dtype, jnp.floating)):
            raise ValueError(f"{name} must be float ({H},), one per query head, not {x.dtype} {x.shape}")


def check_tokens(query: Any, key: Any, **given: Any) -> list[tuple[Any, Any]]:
    """Each of the given ids as a pair, of queries and of keys; raises ValueError where they do not fit."""
    wanted, pairs = (query.shape[:2], key.shape[:2]), []
    for name, x in given.items():
        pair = x if isinstance(x, tuple) else (x, x)
        several = isinstance(x, tuple | list) or (x is not None and wanted[0] != wanted[1])
        if several and not (isinstance(x, tuple) and len(x) == 2 and all(each is not None for each in x)):
            raise ValueError(f"{name}: for queries and keys of their own give a pair of int32 arrays of {wanted}")
        for each, shape in zip(pair, wanted, strict=True):
            if x is not None and (each.shape != shape or each.dtype != jnp.int32):
                raise ValueError(f"{name} must be int32 {shape}, [B, L] of its tokens, not {each.dtype} {each.shape}")
        pairs.append(pair)
    return pairs
