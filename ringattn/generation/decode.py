"""One step of decoding: samples a token per row, stores its keys and values, and computes the next logits.

The parameters stay where they are. A matrix is sharded over the FSDP axes along the model dimension E, and so is the
residual stream of the new tokens: each device multiplies its columns, and a sum over the devices, of a few kilobytes
per token, gives the product. An all-gather, as in training, would send the whole model for every token.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import P, lax
from jaxtyping import Array, Float, Int

from ringattn.attn.decode import decode_attention
from ringattn.config.choices import LayerKind
from ringattn.generation.cache import SHARED, STORED, Cache, Filled, append, encode, filled, read, specs, spread
from ringattn.generation.prefill import MIN_ROWS, logit_spec, output_logits, padded, padded_rows, product
from ringattn.mesh.axes import DATA, FSDP, SEQUENCE, TENSOR
from ringattn.model.families import ACTIVATIONS, FAMILIES, layer_pattern
from ringattn.model.parallel import Params
from ringattn.model.pattern import Place, fold_layers
from ringattn.model.rope import rotate
from ringattn.model.transformer import Attention, FeedForward, Layer, RMSNorm, Transformer, layer_rotations

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
    c, rows, (graphdef, params) = model.config, tokens.size, nnx.split(model.layers)
    factors = [_for_rows(module.norm.factors(), rows) for module in (model.layers.attention, model.layers.feed_forward)]
    positions = cache.offset + jax.reshard(cache.lengths, P(None))
    angles = layer_rotations(c, positions[:, None])
    # Once per step: XLA would compute what it can in every layer, in many small operations.
    angles, filled_slots = lax.optimization_barrier((angles, _filled_slots(cache, base)))

    def layer(carry: tuple[Array, Cache], values: tuple[Params, list[Array]], place: Place) -> tuple[Array, Cache]:
        x, cache = carry
        module: Layer = nnx.merge(graphdef, values[0])
        attention_factors, feed_forward_factors = values[1]
        query, key, value = _project(module.attention, attention_factors, x, rows, angles[place.kind])
        heads, cache = _attend(model, [query, key, value], cache, base, filled_slots[place.kind], place)
        x = x + _finish(module.attention, heads)
        return x + _feed_forward(module.feed_forward, feed_forward_factors, x, rows), cache

    x = padded(model.scaled(_embed(tokens, model.embedding[...], c.dtype)))
    x, cache = fold_layers(layer, (x, cache), (params, factors), layer_pattern(c))
    logits = output_logits(model, model.norm(x[:rows])[:, 0])
    return cache._replace(lengths=cache.lengths + 1), logits


def _for_rows(factors: Float[Array, "N E"], rows: int) -> Float[Array, "N R 1 E"]:
    """Returns the factors of a norm for each row of `padded`, sharded like the residual stream.

    Of few rows these are copies: selecting a layer of them takes a TPU no operation of its own.
    """
    copies = padded_rows(rows) if rows <= MIN_ROWS else 1
    return jnp.repeat(jax.reshard(factors, P(None, FSDP))[:, None, None], copies, axis=1)


def _embed(tokens: Int[Array, " B"], table: Float[Array, "V E"], dtype: str) -> Float[Array, "B 1 E"]:
    """Looks up one token per row."""

    @partial(jax.shard_map, in_specs=(P(None), P(TENSOR, FSDP)), out_specs=RESIDUAL)
    def local(tokens, table):
        rows = tokens - lax.axis_index(TENSOR) * table.shape[0]
        columns = table.at[rows].get(mode="fill", fill_value=0, wrap_negative_indices=False).astype(dtype)
        return lax.psum(columns, TENSOR)[:, None]

    return local(tokens, table)


def _normed_products(
    equation: str,
    norm: RMSNorm,
    factors: Float[Array, "R 1 E"],
    x: Float[Array, "R 1 E"],
    rows: int,
    weights: Sequence[Array],
    specs: list[P],
) -> list[Float[Array, "R 1 ..."]]:
    """Returns the products of norm(x) and each matrix, in the dtype of x, on all devices of FSDP.

    A norm divides all elements of a row by one number. Dividing the products instead takes one sum over the devices,
    where the norm would need its own. Each device rounds its summand to the dtype of x, in which it is sent.
    """
    out_specs = [P(None, None, *spec[1:]) for spec in specs]

    @partial(jax.shard_map, in_specs=(RESIDUAL, RESIDUAL, specs), out_specs=out_specs)
    def local(x, factors, weights):
        x_f32 = x.astype(jnp.float32)
        scaled = (x_f32 * factors).astype(x.dtype)
        products = [product(equation, scaled, weight) for weight in weights]
        squares, *products = lax.psum([(x_f32 * x_f32).sum(-1), *products], FSDP)
        products = [y.astype(x.dtype).astype(jnp.float32) for y in products]  # sent in the dtype of x
        inverse = jnp.tile(lax.rsqrt(squares[:rows] / dim + norm.epsilon), (x.shape[0] // rows, 1))
        return [(y * inverse.reshape(-1, *[1] * (y.ndim - 1))).astype(x.dtype) for y in products]

    dim = x.shape[-1]
    return local(x, factors, list(weights))


def _project(
    attention: Attention,
    factors: Float[Array, "R 1 E"],
    x: Float[Array, "R 1 E"],
    rows: int,
    angles: tuple[Array, Array],
) -> tuple[Float[Array, "B 1 H D"], Float[Array, "B 1 G D"], Float[Array, "B 1 G D"]]:
    """Returns what `Attention.project` returns, for new tokens."""
    family = FAMILIES[attention.config.family]
    weights = [w[...] for w in (attention.query, attention.key, attention.value)]
    found = _normed_products("ble,ehd->blhd", attention.norm, factors, x, rows, weights, [P(FSDP, TENSOR, None)] * 3)
    if family.qkv_bias:
        biases = attention.query_bias, attention.key_bias, attention.value_bias
        found = [
            (y.astype(jnp.float32) + bias[...][None, None]).astype(x.dtype)
            for y, bias in zip(found, biases, strict=True)
        ]
    query, key, value = (y[:rows] for y in found)
    if family.qk_norm:
        query, key = attention.query_norm(query), attention.key_norm(key)
    return rotate(query, *angles), rotate(key, *angles), value


def _finish(attention: Attention, heads: Float[Array, "B 1 H D"]) -> Float[Array, "R 1 E"]:
    """Returns what `Attention.finish` returns, for new tokens."""
    heads = jax.reshard(heads, P(None, None, TENSOR, None))
    x = product("blhd,hde->ble", padded(heads), attention.output[...], RESIDUAL).astype(heads.dtype)
    return attention.post_norm(x) if FAMILIES[attention.config.family].post_norms else x


def _feed_forward(
    feed_forward: FeedForward, factors: Float[Array, "R 1 E"], x: Float[Array, "R 1 E"], rows: int
) -> Float[Array, "R 1 E"]:
    """Returns what `feed_forward` returns, for new tokens."""
    family, weights = FAMILIES[feed_forward.config.family], [feed_forward.gate[...], feed_forward.up[...]]
    gate, up = _normed_products("ble,ef->blf", feed_forward.norm, factors, x, rows, weights, [P(FSDP, TENSOR)] * 2)
    hidden = ACTIVATIONS[family.activation](gate) * up
    x = product("blf,fe->ble", hidden, feed_forward.down[...], RESIDUAL).astype(x.dtype)
    return feed_forward.post_norm(x) if family.post_norms else x


def _filled_slots(cache: Cache, base: Cache | None) -> dict[LayerKind, list[Filled]]:
    """Returns, for each kind of layers, what the slots of `base` hold, and those of `cache` with the new tokens."""

    def of(cache: Cache, spec: P, added: int, kind: LayerKind) -> Filled:
        @partial(jax.shard_map, in_specs=(specs(cache, spec), P(spec[1])), out_specs=_filled_specs(spec))
        def local(cache, lengths):
            return filled(cache, kind, lengths)

        return local(cache, cache.lengths + added)

    shared = [] if base is None else [(base, SHARED, 0)]
    return {kind: [of(*part, kind) for part in [*shared, (cache, STORED, 1)]] for kind in cache.stores}


def _filled_specs(spec: P) -> Any:
    """Returns the specs of a Filled of a cache with `spec`, STORED or SHARED."""
    return Filled(P(spec[1], SEQUENCE), P(spec[1]))  # type: ignore[arg-type]


def _attend(
    model: Transformer,
    qkv: Sequence[Array],
    cache: Cache,
    base: Cache | None,
    filled_slots: list[Filled],
    place: Place,
) -> tuple[Float[Array, "B 1 H D"], Cache]:
    """Writes the key and value of one token per row, and attends to the cache with its query."""
    spec = logit_spec(model, place)
    base_specs: Any = None if base is None else specs(base, SHARED)
    slot_specs = [_filled_specs(spec) for spec in [SHARED] * (base is not None) + [STORED]]
    in_specs = [ROWS] * 3, specs(cache, STORED), base_specs, slot_specs, P()

    @partial(jax.shard_map, in_specs=in_specs, out_specs=(ROWS, specs(cache, STORED)))
    def local(qkv, cache, base, filled_slots, rank):
        here, (query, key, value) = place._replace(rank=rank), qkv
        store = cache.stores[place.kind]
        if store.key_scale is not None:
            query, key = spread(query), spread(key)
        key, value = (encode(x, store.key.dtype) for x in (key, value))
        written = append(store, rank, key, value, cache.lengths)
        cache = cache._replace(stores=cache.stores | {place.kind: written})
        caches = [cache] if base is None else [base, cache]
        parts = [read(each, here, slots) for each, slots in zip(caches, filled_slots, strict=True)]
        heads = decode_attention(spec, query[:, 0], cache.offset + cache.lengths, parts, SEQUENCE)
        return heads[:, None], cache

    return local([jax.reshard(x, ROWS) for x in qkv], cache, base, filled_slots, place.rank)
