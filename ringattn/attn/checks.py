"""The arrays of `attention` and `shard_attention`, and their checks. Each check raises a ValueError with a fix."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Integer

from ringattn.attn.settings import Settings, shown
from ringattn.layout import check_length

MOST_KV_HEADS = 32
"""Arrays with more K/V heads than this, and fewer keys than heads, are assumed to be [B, heads, L, D]."""
AnyArray = Array | np.ndarray
TokenIds = Integer[AnyArray, "B L"] | tuple[Integer[AnyArray, "B L"], Integer[AnyArray, "B M"]] | None
"""One id per token: a single array for queries and keys, or a pair (queries, keys)."""


class Extras(NamedTuple):
    """The optional arrays."""

    positions: TokenIds
    segment_ids: TokenIds
    sinks: Float[Array, " H"] | None
    slopes: Float[Array, " H"] | None
    span_ids: TokenIds


def check_arrays(query: Array, key: Array, value: Array, extras: Extras) -> Extras:
    """Returns `extras` with int32 ids. Raises ValueError if shapes or dtypes are invalid or inconsistent."""
    for name, x in {"query": query, "key": key, "value": value}.items():
        _check_is_array(name, x)
    if query.ndim != 4 or key.ndim != 4 or value.ndim != 4:
        raise ValueError(f"query, key, value must be [B, L, heads, D], not {query.shape}, {key.shape}, {value.shape}")
    (B, _, H, D), (M, G), hint = query.shape, key.shape[1:3], order_hint(query, key, value)
    if key.shape != (B, M, G, D) or value.shape[:3] != (B, M, G):
        raise ValueError(
            f"query {query.shape}, key {key.shape}, value {value.shape} must agree in B, key with query also in D, "
            f"value with key also in length and heads{hint}"
        )
    if G == 0 or H % G:
        fix = f"use H={max(H // max(G, 1), 1) * G}{hint}"
        raise ValueError(f"H={H} query heads must be a multiple of G={G} K/V heads; {fix}")
    if not query.dtype == key.dtype == value.dtype:
        fix = "cast them with .astype(query.dtype)"
        raise ValueError(f"query, key, value must have one dtype, not {query.dtype}, {key.dtype}, {value.dtype}; {fix}")
    if query.dtype not in (jnp.float32, jnp.bfloat16, jnp.float64):
        fix = "cast query, key and value with .astype('float32') or .astype('bfloat16')"
        raise ValueError(f"query.dtype={query.dtype} must be float32 or bfloat16 (float64 with jax_enable_x64); {fix}")
    for name, x in {"sinks": extras.sinks, "slopes": extras.slopes}.items():
        if x is not None:
            _check_is_array(name, x)
            if x.shape != (H,) or not jnp.issubdtype(x.dtype, jnp.floating):
                raise ValueError(f"{name} must be float ({H},), one per query head, not {x.dtype} {x.shape}")
    ids = {"segment_ids": extras.segment_ids, "span_ids": extras.span_ids, "positions": extras.positions}
    return extras._replace(**{name: _int32_ids(name, x, query.shape[:2], key.shape[:2]) for name, x in ids.items()})


def check_lengths(settings: Settings, query: Array, key: Array, devices: int, *, local: bool = False) -> None:
    """Raises ValueError unless the layout divides the lengths of query and key over `devices`.

    With `local`, query and key are the shards of one device.
    """
    for name, x in {"query's length L": query, "key's length M": key}.items():
        length, name = (x.shape[1] * devices, f"global {name}") if local else (x.shape[1], name)
        check_length(length, settings.layout, devices, name, " * ".join(settings.axes), order_hint(query, key))
    keys, heads = key.shape[1] * (devices if local else 1), key.shape[2]
    if keys < heads and heads > MOST_KV_HEADS:
        fix = f"if it is [B, L, heads, D], pad it to {heads} keys, with negative segment_ids{order_hint(query, key)}"
        raise ValueError(f"key has {heads} heads but only {keys} tokens; {fix}")


def manual_devices(axes: tuple[str, ...]) -> int:
    """Returns the number of devices along `axes`. Raises ValueError unless they are manual, as inside a shard_map."""
    for name in axes:
        try:
            lax.axis_size(name)
        except NameError:
            manual = jax.sharding.get_abstract_mesh().manual_axes
            active = (
                f"the enclosing jax.shard_map is over {manual}" if manual else "there is no enclosing jax.shard_map"
            )
            fix = "call shard_attention inside a jax.shard_map over this axis, or ringattn.attention outside of one"
            raise ValueError(f"axis={name!r} must be manual, but {active}; {fix}") from None
    return math.prod(map(lax.axis_size, axes))


def order_hint(*arrays: Array) -> str:
    """Returns a hint to append to a message, if the arrays seem to be [B, heads, L, D]; otherwise ""."""
    if any(x.shape[1] < x.shape[2] for x in arrays):
        return "; the order of dims is [B, L, heads, D]: transpose [B, heads, L, D] by x.swapaxes(1, 2)"
    return ""


def _check_is_array(name: str, x: Any) -> None:
    try:
        _ = x.shape, x.dtype  # not isinstance: an nnx.Param is also accepted
    except AttributeError:
        raise ValueError(f"{name}={shown(x)} must be a JAX or NumPy array; use jnp.asarray") from None


def _int32_ids(name: str, ids: Any, q_shape: tuple[int, ...], kv_shape: tuple[int, ...]) -> TokenIds:
    """Returns `ids` as int32. NumPy arrays, usually int64, may have any integer dtype if their values fit."""
    if ids is None:
        return None
    if isinstance(ids, tuple) and len(ids) == 2 and all(x is not None for x in ids):
        return _int32(name, ids[0], q_shape), _int32(name, ids[1], kv_shape)
    if isinstance(ids, tuple | list) or q_shape != kv_shape:
        rule = f"a pair of int32 arrays, queries {q_shape} and keys {kv_shape}"
        either = f" in a tuple, or one array {q_shape} for both" if q_shape == kv_shape else " in a tuple"
        raise ValueError(f"{name} must be {rule}{either}, not {shown(ids)}")
    return _int32(name, ids, q_shape)


def _int32(name: str, x: Any, shape: tuple[int, ...]) -> Integer[AnyArray, "B L"]:
    _check_is_array(name, x)
    is_numpy = isinstance(x, np.ndarray) and np.issubdtype(x.dtype, np.integer)
    if x.shape != shape or not (is_numpy or x.dtype == jnp.int32):
        fix = "; use .astype('int32')" if x.shape == shape else ""
        raise ValueError(f"{name} must be int32 {shape}, one per token, not {x.dtype} {x.shape}{fix}")
    limits = np.iinfo(np.int32)
    if is_numpy and x.size > 0 and (x.min() < limits.min or x.max() > limits.max):
        raise ValueError(f"{name} has values from {x.min()} to {x.max()}, which must fit int32; use smaller ids")
    return x.astype(np.int32) if is_numpy else x


def ids_pair(ids: TokenIds) -> tuple[Int[Array, "B L"], Int[Array, "B M"]] | tuple[None, None]:
    """Returns (ids of the queries, ids of the keys)."""
    if ids is None:
        return None, None
    queries, keys = ids if isinstance(ids, tuple) else (ids, ids)
    return jnp.asarray(queries), jnp.asarray(keys)
