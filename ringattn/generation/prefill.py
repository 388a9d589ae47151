"""Prefill: a chunk of the prompt attends to itself and to the cache, and is added to the cache.

The tokens of a chunk are striped over the devices, as in the cache, so each device stores the keys and values that it
computes.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import P, lax
from jaxtyping import Array, Bool, Float, Int

from ringattn.attn.decode import UNUSED, chunk_attention
from ringattn.attn.kernels.protocol import CachedKV, LogitSpec, matmul_precision
from ringattn.generation.cache import SHARED, STORED, Cache, encode, filled, read, specs, spread, write
from ringattn.mesh.axes import DATA, FSDP, HEADS, SEQUENCE, TENSOR, TOKENS
from ringattn.model.families import layer_pattern, logit_options, output_soft_cap
from ringattn.model.parallel import Params, embed, soft_capped
from ringattn.model.pattern import Place, fold_layers
from ringattn.model.transformer import Layer, Transformer, layer_rotations

MIN_ROWS = 8
"""See `padded`."""


class Chunk(NamedTuple):
    """A chunk of each row. Token i of row b is number first[b] + i of the row; those from begin[b] to end[b] are valid.

    Numbers count from the start of the row, without the cache that all rows share.
    """

    tokens: Int[Array, "B L"]
    """In striped order over the sequence axes."""
    first: Int[Array, " B"]
    """A multiple of the number of sequence shards."""
    begin: Int[Array, " B"]
    end: Int[Array, " B"]


class _Local(NamedTuple):
    """A chunk on one device."""

    numbers: Int[Array, "B L"]
    """Numbers of the tokens in their rows."""
    valid: Bool[Array, "B L"]
    """True for tokens that are neither before `begin` nor after `end`."""
    first: Int[Array, " B"]
    begin: Int[Array, " B"]
    """See `Chunk`."""
    before: Int[Array, " B"]
    """Number of tokens in the cache before the chunk, per row."""
    after: Int[Array, " B"]
    """Number of tokens in the cache after the chunk."""


def prefill(model: Transformer, cache: Cache, base: Cache | None, chunk: Chunk) -> tuple[Cache, Float[Array, "B L E"]]:
    """Returns the cache with the chunk, and the hidden states [B, L, E] after the final norm, in striped order.

    `base` is a cache that all rows share and that precedes them. Call it inside jax.jit, under the mesh.
    """
    c, (graphdef, params) = model.config, nnx.split(model.layers)
    length = chunk.tokens.shape[1]
    shards = length // jax.typeof(chunk.tokens).sharding.shard_shape(chunk.tokens.shape)[1]
    order = jnp.arange(length, dtype=jnp.int32).reshape(-1, shards).T.reshape(1, -1)
    numbers = jax.reshard(chunk.first, P(DATA))[:, None] + jax.reshard(order, P(None, SEQUENCE))
    angles = layer_rotations(c, cache.offset + numbers)

    def layer(carry: tuple[Array, Cache], values: Params, place: Place) -> tuple[Array, Cache]:
        x, cache = carry
        module: Layer = nnx.merge(graphdef, values)
        query, key, value = module.attention.project(x, angles[place.kind])
        spec = logit_spec(model, place)
        heads, cache = _attend(spec, (query, key, value), chunk, numbers, cache, base, place)
        return module.finish(x, heads), cache

    x = model.scaled(embed(chunk.tokens, model.embedding[...], c.dtype))
    x, cache = fold_layers(layer, (x, cache), params, layer_pattern(c))
    lengths = jnp.maximum(cache.lengths, chunk.end)
    return cache._replace(lengths=lengths), model.norm(x)


def logit_spec(model: Transformer, place: Place) -> LogitSpec:
    """Returns the logits of attention in a layer."""
    options = logit_options(model.config, place.kind)
    scale = model.config.head_dim**-0.5 if options["scale"] is None else options["scale"]
    return LogitSpec(options["mask"], scale, options["soft_cap"])


def _attend(
    spec: LogitSpec,
    qkv: tuple[Array, Array, Array],
    chunk: Chunk,
    numbers: Int[Array, "B L"],
    cache: Cache,
    base: Cache | None,
    place: Place,
) -> tuple[Float[Array, "B L H D"], Cache]:
    """Returns the attention output of a chunk in one layer, and the cache with its keys and values."""
    rows, base_specs = P(DATA), None if base is None else specs(base, SHARED)
    in_specs = (HEADS, HEADS, HEADS), TOKENS, (rows, rows, rows), specs(cache, STORED), base_specs, P()

    @partial(jax.shard_map, in_specs=in_specs, out_specs=(HEADS, specs(cache, STORED)))
    def local(qkv, numbers, limits, cache, base, rank):
        here, (first, begin, end) = place._replace(rank=rank), limits
        valid = (numbers >= begin[:, None]) & (numbers < end[:, None])
        before, after = jnp.minimum(cache.lengths, begin), jnp.maximum(cache.lengths, end)
        tokens = _Local(numbers, valid, first, begin, before, after)
        query, key, value = qkv
        if cache.stores[place.kind].key_scale is not None:
            query, key = spread(query), spread(key)
        parts = [] if base is None else [read(base, here, filled(base, here.kind, base.lengths))]
        cache, own = _store(cache, here, (key, value), tokens)
        positions = jnp.where(valid, cache.offset + numbers, -1)
        return chunk_attention(spec, query, positions, [*parts, *own], SEQUENCE), cache

    return local(qkv, numbers, (chunk.first, chunk.begin, chunk.end), cache, base, place.rank)


def _store(cache: Cache, place: Place, kv: tuple[Array, Array], tokens: _Local) -> tuple[Cache, list[CachedKV]]:
    """Writes the keys and values of a chunk. Returns the cache and what the chunk attends to: it includes itself.

    Without a window, these are the slots after writing. With one, they are the slots before writing, which may
    overwrite what the first tokens of the chunk still see, and the chunk.
    """
    store = cache.stores[place.kind]
    key, value = (encode(x, store.key.dtype) for x in kv)
    written = write(store, place.rank, key, value, (tokens.first, tokens.begin, tokens.after))
    after = cache._replace(stores=cache.stores | {place.kind: written})
    if place.kind == "full":
        return after, [read(after, place, filled(after, place.kind, tokens.after))]
    positions = jnp.where(tokens.valid, cache.offset + tokens.numbers, UNUSED)
    arrays = [None if x is None else jnp.moveaxis(x, 1, 2) for x in (key[0], value[0], key[1], value[1])]
    key, value, *scales = (None if x is None else x[None] for x in arrays)
    assert key is not None
    assert value is not None
    in_use = jnp.full_like(tokens.first, positions.shape[1])
    own = CachedKV(key, value, scales[0], scales[1], positions, in_use, jnp.zeros_like(place.rank))
    return after, [read(cache, place, filled(cache, place.kind, tokens.before)), own]


def logits_at(model: Transformer, hidden: Float[Array, "B L E"], index: Int[Array, " B"]) -> Float[Array, "B V"]:
    """Returns float32 logits, replicated, of the token at `index`, in storage order, of each row."""
    spec = P(DATA, None)
    one_hot = jax.nn.one_hot(index, hidden.shape[1], dtype=hidden.dtype)
    one_hot = jax.reshard(one_hot, TOKENS)
    einsum = partial(jnp.einsum, precision=matmul_precision(hidden.dtype), preferred_element_type=jnp.float32)
    state = einsum("bl,ble->be", one_hot, hidden, out_sharding=spec).astype(hidden.dtype)
    return output_logits(model, jax.reshard(state, P(None, None)))


def output_logits(model: Transformer, state: Float[Array, "B E"]) -> Float[Array, "B V"]:
    """Returns the float32 logits, replicated, of final hidden states whose rows are on all devices."""
    rows, state = state.shape[0], padded(jax.reshard(state, P(None, FSDP)))

    @partial(jax.shard_map, in_specs=(P(None, FSDP), P(TENSOR, FSDP)), out_specs=P(None, TENSOR))
    def local(state, table):
        return lax.psum(product("be,ve->bv", state, table)[:rows], FSDP)

    logits = jax.reshard(local(state, model.output_table()), P(None, None))[:, : model.vocabulary]
    return soft_capped(logits, output_soft_cap(model.config))


def product(equation: str, x: Array, weight: Array, spec: jax.P | None = None) -> Array:
    """Returns an einsum in the dtype of x, with a float32 result, sharded by `spec` on an explicit mesh."""
    options = {"precision": matmul_precision(x.dtype), "preferred_element_type": jnp.float32}
    return jnp.einsum(equation, x, weight.astype(x.dtype), out_sharding=spec, **options)


def padded(x: Float[Array, "B ..."]) -> Float[Array, "R ..."]:
    """Returns copies of the rows of `x`, at least MIN_ROWS.

    The TPU compiler computes a product with one row without the matrix unit, which takes four times as long as reading
    the matrix. Padding with zeros would be a separate operation.
    """
    return jnp.tile(x, (padded_rows(x.shape[0]) // x.shape[0], *[1] * (x.ndim - 1)))


def padded_rows(rows: int) -> int:
    """Returns the number of rows of `padded`: a multiple of `rows`."""
    return -(-MIN_ROWS // rows) * rows
