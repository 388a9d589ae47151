"""The K/V cache of a model, sharded over the sequence axes of the mesh.

Token p of a row is on device p % shards, in slot p // shards, so every length is balanced and a larger cache leaves
each token where it is. Layers with a window keep the tokens that can still be seen: slot (p // shards) % slots.
"""

import math
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import P, lax
from jaxtyping import Array, Float, Int, Num

from ringattn import config
from ringattn.attn.decode import UNUSED
from ringattn.attn.kernels.protocol import CachedKV
from ringattn.attn.kernels.tpu_decode import UNIT
from ringattn.config.choices import LayerKind
from ringattn.mesh.axes import DATA, SEQUENCE, TENSOR, context_shards
from ringattn.model.families import layer_kinds
from ringattn.model.pattern import Place

MIN_TOKENS = 256
"""Smallest capacity. Capacities are this times a power of two, so that few programs are compiled."""
SLOT_UNIT = 8 * UNIT
"""Larger numbers of slots per device are multiples of this, so that they divide into tiles of the kernel for TPUs."""
STORED = P(None, DATA, TENSOR, SEQUENCE, None)
"""Spec of the keys and values of rows [layers, B, G, S, D]."""
SHARED = P(None, None, TENSOR, SEQUENCE, None)
"""Spec of the keys and values of one row that all rows share."""


class Store(NamedTuple):
    """Keys and values of all layers of one kind, in storage order. Scales, in bfloat16, only with int8."""

    key: Num[Array, "layers B G S D"]
    value: Num[Array, "layers B G S D"]
    key_scale: Float[Array, "layers B G S"] | None
    value_scale: Float[Array, "layers B G S"] | None


class Cache(NamedTuple):
    """Cached tokens of B rows. Row b holds the tokens at positions offset to offset + lengths[b] - 1."""

    stores: dict[LayerKind, Store]
    lengths: Int[Array, " B"]
    offset: Int[Array, ""]
    """Number of tokens that precede all rows, in a cache that they share."""


def capacity(tokens: int, most: int) -> int:
    """Returns the capacity for `tokens` tokens: MIN_TOKENS times a power of two, at most `most`."""
    return min(max(MIN_TOKENS, 1 << (tokens - 1).bit_length()), most)


def slots(c: config.Model, kind: LayerKind, tokens: int, shards: int) -> int:
    """Returns the number of slots per device for `tokens` tokens of a row, in layers of a kind."""
    if kind == "window" and c.window is not None:
        # One more, so that a token written ahead of time overwrites nothing that can be seen.
        tokens = min(tokens, c.window + 2)
    count = math.ceil(tokens / shards)
    return count if count <= SLOT_UNIT else math.ceil(count / SLOT_UNIT) * SLOT_UNIT


@lru_cache(maxsize=32)
def _zeros(c: config.Model, rows: int, tokens: int, dtype: str, mesh: jax.sharding.Mesh):
    def create(offset: Int[Array, ""]) -> Cache:
        stores: dict[LayerKind, Store] = {}
        for kind, layers in layer_kinds(c).items():
            length = slots(c, kind, tokens, context_shards(mesh)) * context_shards(mesh)
            shape = (layers, rows, c.kv_heads, length, c.head_dim)
            key, value = (jnp.zeros(shape, dtype, out_sharding=STORED) for _ in range(2))
            scales = (None, None)
            if dtype == "int8":
                scales = [jnp.zeros(shape[:-1], jnp.bfloat16, out_sharding=P(*STORED[:-1])) for _ in range(2)]
            stores[kind] = Store(key, value, *scales)
        return Cache(stores, jnp.zeros(rows, jnp.int32, out_sharding=P(DATA)), offset)

    return jax.jit(create)


def empty(
    c: config.Model, rows: int, tokens: int, dtype: str, mesh: jax.sharding.Mesh, offset: int | Array = 0
) -> Cache:
    """Returns a cache for `rows` rows of `tokens` tokens in `dtype`: float32, bfloat16 or int8. Call it under `mesh`.

    `rows` must be a multiple of the data axis size.
    """
    return _zeros(c, rows, tokens, dtype, mesh)(jnp.int32(offset))


@partial(jax.jit, static_argnums=(1, 2, 3))
def grow(cache: Cache, c: config.Model, tokens: int, mesh: jax.sharding.Mesh) -> Cache:
    """Returns `cache` with room for `tokens` tokens per row. Call it under `mesh`."""
    shards = context_shards(mesh)

    def grown(kind: LayerKind, x: Array) -> Array:
        added = slots(c, kind, tokens, shards) - x.shape[3] // shards
        if added <= 0:  # also a window, whose slots are in use from the first to the last
            return x
        spec = P(*STORED[: x.ndim])

        @partial(jax.shard_map, in_specs=spec, out_specs=spec)
        def padded(x: Array) -> Array:
            return jnp.pad(x, [(0, added if dim == 3 else 0) for dim in range(x.ndim)])

        return padded(x)

    stores = {kind: jax.tree.map(partial(grown, kind), store) for kind, store in cache.stores.items()}
    return cache._replace(stores=stores)


@jax.jit
def shared(cache: Cache) -> Cache:
    """Returns row 0 of `cache` as a cache that the rows of another one share. Call it under the mesh."""

    def first(x: Array) -> Array:
        return jax.reshard(x, P(*SHARED[: x.ndim]))[:, :1]

    return cache._replace(stores=jax.tree.map(first, cache.stores), lengths=jax.reshard(cache.lengths, P())[:1])


def bytes_per_device(cache: Cache) -> int:
    """Returns the bytes of keys, values and scales on each device."""
    return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(cache.stores))


def specs(cache: Cache, spec: jax.P) -> Any:
    """Returns the specs of a cache, as a Cache: STORED, or SHARED for a shared one."""
    stores = jax.tree.map(lambda x: P(*spec[: x.ndim]), cache.stores)
    return Cache(stores, *[P(spec[1]), P()])  # type: ignore[arg-type]


# Inside a shard_map over the mesh: each device has its part of a cache.


def stored_numbers(slots: int, lengths: Int[Array, " rows"]) -> Int[Array, "rows slots"]:
    """Returns the numbers in their rows of the tokens in the local slots; negative for a slot without one.

    `lengths` is the number of tokens of each row.
    """
    shard, shards = lax.axis_index(SEQUENCE), lax.axis_size(SEQUENCE)
    last = (lengths[:, None] - shard + shards - 1) // shards - 1  # of this device
    slot = jnp.arange(slots, dtype=jnp.int32)[None]
    return (last - (last - slot) % slots) * shards + shard


class Filled(NamedTuple):
    """Content of the local slots of all layers of a kind."""

    positions: Int[Array, "rows slots"]
    """Positions of the keys; UNUSED for a slot without one."""
    in_use: Int[Array, " rows"]
    """See `CachedKV.slots_in_use`."""


def filled(cache: Cache, kind: LayerKind, lengths: Int[Array, " rows"]) -> Filled:
    """Returns what the slots of a layer hold; `lengths` is the number of tokens of each row."""
    slots = cache.stores[kind].key.shape[3]
    numbers = stored_numbers(slots, lengths)
    positions = jnp.where(numbers >= 0, cache.offset + numbers, UNUSED)
    return Filled(positions, jnp.minimum(-(-lengths // lax.axis_size(SEQUENCE)), slots))


def read(cache: Cache, place: Place, filled: Filled) -> CachedKV:
    """Returns the local keys and values of one layer."""
    return CachedKV(*cache.stores[place.kind], *filled, place.rank)


def spread(x: Float[Array, "B L heads D"]) -> Float[Array, "B L heads D"]:
    """Rotates queries or keys by an orthogonal matrix, for a cache in int8. Their products stay the same.

    A few dims of a key are much larger than the others, and would set the scale of all. After a Hadamard transform no
    dim stands out (QuaRot, arXiv 2404.00456). Of a head dim that is no power of two, each of its largest parts that are
    is transformed.
    """
    dim = x.shape[-1]
    size, matrix = dim & -dim, np.ones((1, 1), np.float32)
    while matrix.shape[0] < size:
        matrix = np.kron(matrix, np.array([[1, 1], [1, -1]], np.float32))
    parts = x.astype(jnp.float32).reshape(*x.shape[:-1], dim // size, size)
    product = jnp.einsum("blhpd,de->blhpe", parts, matrix / math.sqrt(size), precision=lax.Precision.HIGHEST)
    return product.reshape(x.shape).astype(x.dtype)


Encoded = tuple[Num[Array, "B L G D"], Float[Array, "B L G"] | None]
"""Keys or values in the dtype of a cache, and their scales."""


def encode(x: Float[Array, "B L G D"], dtype: jnp.dtype) -> Encoded:
    """Returns `x` in the dtype of a cache, and for int8 one scale per token and head."""
    if dtype != jnp.int8:
        return x.astype(dtype), None
    largest = jnp.abs(x.astype(jnp.float32)).max(-1)
    scale = (largest / 127).astype(jnp.bfloat16)
    divisor = jnp.where(scale > 0, scale, 1).astype(jnp.float32)
    return jnp.clip(jnp.round(x.astype(jnp.float32) / divisor[..., None]), -127, 127).astype(jnp.int8), scale


def append(store: Store, rank: Int[Array, ""], key: Encoded, value: Encoded, lengths: Int[Array, " B"]) -> Store:
    """Writes one token per row, after `lengths` tokens, to one layer of the local part of a store.

    `key` and `value` are [B, 1, G, D]. Updates in place: a scatter would make the TPU compiler choose another layout
    for the cache, and copy it.
    """
    shard, shards = lax.axis_index(SEQUENCE), lax.axis_size(SEQUENCE)
    slots, mine = lengths // shards % store.key.shape[3], lengths % shards == shard

    def put(stack: Array, x: Array) -> Array:
        x = jnp.moveaxis(x, 1, 2)[None]  # [1, B, G, 1, ...]

        def one_row(row: Int[Array, ""], stack: Array) -> Array:
            new = lax.dynamic_slice_in_dim(x, row, 1, 1)
            index = (rank, row, jnp.int32(0), slots[row], *[jnp.int32(0)] * (stack.ndim - 4))
            old = lax.dynamic_slice(stack, index, new.shape)
            return lax.dynamic_update_slice(stack, jnp.where(mine[row], new, old), index)

        return lax.fori_loop(0, x.shape[1], one_row, stack) if x.shape[1] > 1 else one_row(jnp.int32(0), stack)

    return _map_arrays(put, store, key, value)


def write(store: Store, rank: Int[Array, ""], key: Encoded, value: Encoded, chunk: tuple[Array, Array, Array]) -> Store:
    """Writes the tokens of a chunk [B, L, G, D] to one layer of the local part of a store.

    `chunk` is (first, begin, lengths), int32 [B] each: see `prefill.Chunk`; `lengths` includes the chunk. Each slot
    takes its token from the chunk, if that has it.
    """
    first, begin, lengths = chunk
    numbers = stored_numbers(store.key.shape[3], lengths)
    is_new = numbers >= begin[:, None]
    index = jnp.where(is_new, (numbers - first[:, None]) // lax.axis_size(SEQUENCE), 0)

    def put(stack: Array, x: Array) -> Array:
        x = jnp.moveaxis(x, 1, 2)  # [B, G, L, ...]
        dims = (slice(None), None, slice(None), *[None] * (x.ndim - 3))
        new = jnp.take_along_axis(x, index[dims], axis=2)
        old = lax.dynamic_index_in_dim(stack, rank, keepdims=False)
        return lax.dynamic_update_index_in_dim(stack, jnp.where(is_new[dims], new, old), rank, 0)

    return _map_arrays(put, store, key, value)


def _map_arrays(put: Callable[[Array, Array], Array], store: Store, key: Encoded, value: Encoded) -> Store:
    """Returns `store` with put(stack, x) for keys, values and their scales."""
    pairs = zip(store, (key[0], value[0], key[1], value[1]), strict=True)
    new_key, new_value, *scales = (None if stack is None or x is None else put(stack, x) for stack, x in pairs)
    assert new_key is not None
    assert new_value is not None
    return Store(new_key, new_value, scales[0], scales[1])
