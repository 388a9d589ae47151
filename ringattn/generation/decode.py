"""One step of decoding: samples a token per row, stores its keys and values, and computes the next logits.

The parameters stay where they are. A matrix is sharded over the FSDP axes along the model dimension E, and so is the
residual stream of the new tokens: each device multiplies its columns, and a sum over the devices, of a few kilobytes
per token, gives the product. An all-gather, as in training, would send the whole model for every token.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
from flax import nnx
from jax import P, lax
from jaxtyping import Array, Float, Int

from ringattn.attn.decode import decode_attention
from ringattn.generation.cache import SHARED, STORED, Cache, append, encode, read, specs, spread
from ringattn.generation.prefill import logit_spec, output_logits, product
from ringattn.mesh.axes import DATA, FSDP, SEQUENCE, TENSOR
from ringattn.model.families import ACTIVATIONS, FAMILIES, layer_pattern
from ringattn.model.parallel import Params
from ringattn.model.pattern import Place, fold_layers
from ringattn.model.rope import rotate
from ringattn.model.transformer import Attention, FeedForward, Layer, Transformer, layer_rotations

RESIDUAL = P(None, None, FSDP)
"""Spec of the residual stream of new tokens [B, 1, E]: all rows on all devices."""
ROWS = P(DATA, None, TENSOR, None)
"""Spec of queries, keys and values of new tokens [B, 1, heads, D]."""


def decode(
    model: Transformer, cache: Cache, base: Cache | None, tokens: Int[Array, " B"]
) -> tuple[Cache, Float[Array, "B V"]]:
    """Appends one token to each row. Returns the cache and the float32 logits [B, V] of the next tokens, replicated.

    `tokens` are replicated. The cache must have room. Call it inside jax.jit, under the mesh.
    """
    c, (graphdef, params) = model.config, nnx.split(model.layers)
    positions = cache.offset + jax.reshard(cache.lengths, P(None))
    angles = layer_rotations(c, positions[:, None])

    def layer(carry: tuple[Array, Cache], values: Params, place: Place) -> tuple[Array, Cache]:
        x, cache = carry
        module: Layer = nnx.merge(graphdef, values)
        query, key, value = _project(module.attention, x, angles[place.kind])
        heads, cache = _attend(model, [query, key, value], cache, base, place)
        x = x + _finish(module.attention, heads)
        return x + _feed_forward(module.feed_forward, x), cache

    x = model.scaled(_embed(tokens, model.embedding[...], c.dtype))
    x, cache = fold_layers(layer, (x, cache), params, layer_pattern(c))
    logits = output_logits(model, model.norm(x)[:, 0])
    return cache._replace(lengths=cache.lengths + 1), logits


def _embed(tokens: Int[Array, " B"], table: Float[Array, "V E"], dtype: str) -> Float[Array, "B 1 E"]:
    """Looks up one token per row."""

    @partial(jax.shard_map, in_specs=(P(None), P(TENSOR, FSDP)), out_specs=RESIDUAL)
    def local(tokens, table):
        rows = tokens - lax.axis_index(TENSOR) * table.shape[0]
        columns = table.at[rows].get(mode="fill", fill_value=0, wrap_negative_indices=False).astype(dtype)
        return lax.psum(columns, TENSOR)[:, None]

    return local(tokens, table)


def _project(
    attention: Attention, x: Float[Array, "B 1 E"], angles: tuple[Array, Array]
) -> tuple[Float[Array, "B 1 H D"], Float[Array, "B 1 G D"], Float[Array, "B 1 G D"]]:
    """Returns what `Attention.project` returns, for new tokens."""
    family, dtype, x = FAMILIES[attention.config.family], x.dtype, attention.norm(x)
    spec = P(None, None, TENSOR, None)
    found = [product("ble,ehd->blhd", x, w[...], spec) for w in (attention.query, attention.key, attention.value)]
    if family.qkv_bias:
        biases = attention.query_bias, attention.key_bias, attention.value_bias
        found = [x + bias[...][None, None] for x, bias in zip(found, biases, strict=True)]
    query, key, value = (x.astype(dtype) for x in found)
    if family.qk_norm:
        query, key = attention.query_norm(query), attention.key_norm(key)
    return rotate(query, *angles), rotate(key, *angles), value


def _finish(attention: Attention, heads: Float[Array, "B 1 H D"]) -> Float[Array, "B 1 E"]:
    """Returns what `Attention.finish` returns, for new tokens."""
    heads = jax.reshard(heads, P(None, None, TENSOR, None))
    x = product("blhd,hde->ble", heads, attention.output[...], RESIDUAL).astype(heads.dtype)
    return attention.post_norm(x) if FAMILIES[attention.config.family].post_norms else x


def _feed_forward(feed_forward: FeedForward, x: Float[Array, "B 1 E"]) -> Float[Array, "B 1 E"]:
    """Returns what `feed_forward` returns, for new tokens."""
    family, dtype, x = FAMILIES[feed_forward.config.family], x.dtype, feed_forward.norm(x)
    spec = P(None, None, TENSOR)
    gate, up = (product("ble,ef->blf", x, w[...], spec).astype(dtype) for w in (feed_forward.gate, feed_forward.up))
    hidden = ACTIVATIONS[family.activation](gate) * up
    x = product("blf,fe->ble", hidden, feed_forward.down[...], RESIDUAL).astype(dtype)
    return feed_forward.post_norm(x) if family.post_norms else x


def _attend(
    model: Transformer, qkv: Sequence[Array], cache: Cache, base: Cache | None, place: Place
) -> tuple[Float[Array, "B 1 H D"], Cache]:
    """Writes the key and value of one token per row, and attends to the cache with its query."""
    spec = logit_spec(model, place)
    base_specs: Any = None if base is None else specs(base, SHARED)
    in_specs = [ROWS] * 3, specs(cache, STORED), base_specs, P()

    @partial(jax.shard_map, in_specs=in_specs, out_specs=(ROWS, specs(cache, STORED)))
    def local(qkv, cache, base, rank):
        here, (query, key, value) = place._replace(rank=rank), qkv
        store = cache.stores[place.kind]
        if store.key_scale is not None:
            query, key = spread(query), spread(key)
        key, value = (encode(x, store.key.dtype) for x in (key, value))
        written = append(store, rank, key, value, cache.lengths)
        cache = cache._replace(stores=cache.stores | {place.kind: written})
        parts = [] if base is None else [read(base, here, base.lengths)]
        parts.append(read(cache, here, cache.lengths + 1))
        heads = decode_attention(spec, query[:, 0], cache.offset + cache.lengths, parts, SEQUENCE)
        return heads[:, None], cache

    return local([jax.reshard(x, ROWS) for x in qkv], cache, base, place.rank)
