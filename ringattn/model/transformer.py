"""A decoder of the Llama kind: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

Parameters are float32 and lie in pieces: one dim over the FSDP axes, heads, feed-forward and vocabulary over the
tensor axis; those of all layers are stacked, dim 0 is the layer. `whole` gathers a layer's for the moment of use. All
but attention is local to the token, so a row may lie over the ring in any order; attention comes as a function.
"""

from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import P, lax
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from ringattn import config
from ringattn.mesh import ACTIVATIONS, FSDP, HEADS, TENSOR, TOKENS, VOCABULARY_MULTIPLE
from ringattn.model.rope import rotate, rotations

EPSILON = 1e-6
CHUNK = 1024
"""Tokens of each local row whose feed-forward exists at a time, where layers are computed again."""

INWARD, OUTWARD = P(FSDP, TENSOR, None), P(TENSOR, None, FSDP)
"""How a layer's projections to heads [E, heads, D] and from them [H, D, E] lie."""

AttentionFunction = Callable[..., Float[Array, "B L H D"]]
"""Called as attention(query, key, value, segment_ids=segment_ids); a query sees keys of its own segment."""

Params = Any
"""An nnx.State: a tree of a model's parameters."""


def whole(piece: Float[Array, "..."], dtype: DTypeLike, dim: int) -> Float[Array, "..."]:
    """Inside a shard_map: the parameter of which `piece` is this device's, whole along `dim`, in `dtype`.

    An all-gather over the FSDP axes in `dtype`; the gradient is summed over the devices in the parameter's float32.
    """
    return _whole(piece, dtype, dim)


def _gathered(piece: Array, dtype: DTypeLike, dim: int) -> Array:
    # Rounded by an operation of its own: a mere cast of its slices is what the TPU compiler makes, for all layers at
    # once, before the first of them begins.
    kind = jnp.finfo(dtype)
    rounded = lax.reduce_precision(piece, kind.nexp, kind.nmant)
    return lax.all_gather(rounded.astype(dtype), FSDP, axis=dim, tiled=True)


def _gathered_forward(piece: Array, dtype: DTypeLike, dim: int) -> tuple[Array, None]:
    return _gathered(piece, dtype, dim), None


def _gathered_backward(dtype: DTypeLike, dim: int, _: None, gradient: Array) -> tuple[Array]:
    return (lax.psum_scatter(gradient.astype(jnp.float32), FSDP, scatter_dimension=dim, tiled=True),)


_whole: Any = jax.custom_vjp(_gathered, nondiff_argnums=(1, 2))
_whole.defvjp(_gathered_forward, _gathered_backward)


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], std: float, spec: jax.sharding.PartitionSpec) -> nnx.Param:
    """A float32 parameter, drawn where it lies; the numbers depend on the seed alone, not on the mesh."""
    return nnx.Param(std * jax.random.normal(rngs.params(), shape, jnp.float32, out_sharding=spec))


class RMSNorm(nnx.Module):
    """x / rms(x) * scale, in float32; the result is in the dtype of x."""

    def __init__(self, *shape: int):
        self.scale = nnx.Param(jnp.ones(shape, jnp.float32, out_sharding=P(*(None for _ in shape))))

    def __call__(self, x: Float[Array, "B L E"]) -> Float[Array, "B L E"]:
        return normalized(x, self.scale[...])


def normalized(x: Float[Array, "... E"], scale: Float[Array, " E"]) -> Float[Array, "... E"]:
    wide = x.astype(jnp.float32)
    wide = wide * lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + EPSILON)
    return (wide * jnp.expand_dims(scale, range(x.ndim - 1))).astype(x.dtype)


class Attention(nnx.Module):
    def __init__(self, c: config.Model, attention: AttentionFunction, rngs: nnx.Rngs):
        self.dtype, self.attention = c.dtype, attention
        heads, groups = (c.layers, c.dim, c.heads, c.head_dim), (c.layers, c.dim, c.kv_heads, c.head_dim)
        std, back = c.dim**-0.5, (2 * c.layers * c.heads * c.head_dim) ** -0.5
        self.norm = RMSNorm(c.layers, c.dim)
        self.query = normal(rngs, heads, std, P(None, *INWARD))
        self.key = normal(rngs, groups, std, P(None, *INWARD))
        self.value = normal(rngs, groups, std, P(None, *INWARD))
        self.output = normal(rngs, (c.layers, c.heads, c.head_dim, c.dim), back, P(None, *OUTWARD))

    def __call__(
        self, x: Float[Array, "B L E"], angles: tuple[Array, Array], segment_ids: Int[Array, "B L"]
    ) -> Float[Array, "B L E"]:
        """x, and what attention adds to it."""
        turned, pieces = P(*TOKENS, None, None), (self.query[...], self.key[...], self.value[...])

        @partial(jax.shard_map, in_specs=(ACTIVATIONS, P(None), INWARD, (turned, turned)), out_specs=HEADS)
        def inward(x, scale, pieces, angles):
            x = normalized(x, scale)
            query, key, value = (jnp.einsum("ble,ehd->blhd", x, whole(piece, self.dtype, 0)) for piece in pieces)
            return rotate(query, *angles), rotate(key, *angles), value

        @partial(jax.shard_map, in_specs=(ACTIVATIONS, HEADS, OUTWARD), out_specs=ACTIVATIONS)
        def outward(x, mixed, piece):
            return x + lax.psum(jnp.einsum("blhd,hde->ble", mixed, whole(piece, self.dtype, 2)), TENSOR)

        query, key, value = inward(x, self.norm.scale[...], pieces, angles)
        return outward(x, self.attention(query, key, value, segment_ids=segment_ids), self.output[...])


class FeedForward(nnx.Module):
    def __init__(self, c: config.Model, rngs: nnx.Rngs):
        self.dtype, self.in_chunks = c.dtype, c.remat != "off"
        wide, back = (c.layers, c.dim, c.feed_forward), (2 * c.layers * c.feed_forward) ** -0.5
        self.norm = RMSNorm(c.layers, c.dim)
        self.gate = normal(rngs, wide, c.dim**-0.5, P(None, FSDP, TENSOR))
        self.up = normal(rngs, wide, c.dim**-0.5, P(None, FSDP, TENSOR))
        self.down = normal(rngs, (c.layers, c.feed_forward, c.dim), back, P(None, TENSOR, FSDP))

    def __call__(self, x: Float[Array, "B L E"]) -> Float[Array, "B L E"]:
        """x, and what the feed-forward adds to it."""
        weights = self.norm.scale[...], self.gate[...], self.up[...], self.down[...]
        if self.in_chunks:  # as whole weights, or their gradients, are not to be held while attention computes
            x, weights = lax.optimization_barrier((x, weights))
        specs = P(None), P(FSDP, TENSOR), P(FSDP, TENSOR), P(TENSOR, FSDP)

        @partial(jax.shard_map, in_specs=(ACTIVATIONS, *specs), out_specs=ACTIVATIONS)
        def local(x, scale, gate, up, down):
            # float32 here, and back in each chunk: the chunks' gradients are summed in this dtype.
            gate, up, down = (
                whole(piece, self.dtype, dim).astype(jnp.float32) for piece, dim in ((gate, 0), (up, 0), (down, 1))
            )

            def tokens(x):
                normed = normalized(x, scale)
                inner = nnx.silu(normed @ gate.astype(self.dtype)) * (normed @ up.astype(self.dtype))
                return x + lax.psum(inner @ down.astype(self.dtype), TENSOR)

            if not self.in_chunks:
                return tokens(x)
            by_position = lax.map(jax.checkpoint(tokens), jnp.moveaxis(x, 1, 0), batch_size=CHUNK)
            return jnp.moveaxis(by_position, 0, 1)

        return local(x, *weights)


class Layer(nnx.Module):
    """Attention and feed-forward; its parameters are those of all layers, stacked, of which a scan takes one by one."""

    def __init__(self, c: config.Model, attention: AttentionFunction, rngs: nnx.Rngs):
        self.attention, self.feed_forward = Attention(c, attention, rngs), FeedForward(c, rngs)

    def __call__(
        self, x: Float[Array, "B L E"], angles: tuple[Array, Array], segment_ids: Int[Array, "B L"]
    ) -> Float[Array, "B L E"]:
        return self.feed_forward(self.attention(x, angles, segment_ids))


def _all_but_weights(primitive: Any, *_: Any, **__: Any) -> bool:
    """A layer's whole weights are gathered and cast again, or each device would hold the whole model."""
    return primitive.name not in ("all_gather", "convert_element_type")


KEPT = {
    "off": _all_but_weights,
    "on": jax.checkpoint_policies.save_only_these_names("attention_out", "attention_lse"),
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=["attention_lse"],
        names_which_can_be_offloaded=["layer_input", "attention_out"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}
"""What a layer keeps for the backward pass beside its input; the rest is computed again. With attention's output and
log-sum-exp at hand, K/V need not go round the ring a third time."""


class Transformer(nnx.Module):
    """Tokens -> hidden states; the output projection is left to the loss, which never holds all logits.

    Made under `jax.set_mesh` of an explicit mesh, best inside `jax.jit`: then no device ever holds a whole
    parameter. The residual stream is in the compute dtype: it is what a long context keeps in memory, and every
    reader of it, the RMSNorm of each layer, works in float32.
    """

    def __init__(self, c: config.Model, vocabulary: int, attention: AttentionFunction, rngs: nnx.Rngs):
        """`vocabulary` counts the ids there are; the tables are padded to a multiple of 128, to divide over axes."""
        self.config = c
        rows = -(-vocabulary // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
        self.embedding = normal(rngs, (rows, c.dim), 0.02, P(TENSOR, FSDP))
        self.layers = Layer(c, attention, rngs)
        self.norm = RMSNorm(c.dim)
        if not c.tied:
            self.unembedding = normal(rngs, (rows, c.dim), 0.02, P(TENSOR, FSDP))

    def __call__(
        self, tokens: Int[Array, "B L"], positions: Int[Array, "B L"], segment_ids: Int[Array, "B L"]
    ) -> Float[Array, "B L E"]:
        """Hidden states in the compute dtype, after the final norm.

        The three arrays are int32 and lie in the order that `attention` expects; a position counts from the
        beginning of its document.
        """
        tokens, positions, segment_ids = (jax.reshard(x, TOKENS) for x in (tokens, positions, segment_ids))
        angles = rotations(positions, self.config)
        graphdef, params = nnx.split(self.layers)

        def layer(x, params):
            x = checkpoint_name(x, "layer_input")
            return nnx.merge(graphdef, params)(x, angles, segment_ids), None

        layer = jax.checkpoint(layer, policy=KEPT[self.config.remat], prevent_cse=False)
        x, _ = lax.scan(layer, embed(tokens, self.embedding[...], self.config.dtype), params)
        return self.norm(x)

    def output(self) -> Float[Array, "V E"]:
        """The output projection, float32, in pieces as the parameter lies: the loss gathers it."""
        return (self.embedding if self.config.tied else self.unembedding)[...]


@partial(jax.jit, static_argnums=2)
def embed(tokens: Int[Array, "B L"], table: Float[Array, "V E"], dtype: str) -> Float[Array, "B L E"]:
    """The tokens' rows of the table, in `dtype`. The table stays in pieces, and its gradient is summed in float32.

    Every device looks all tokens up in its piece of the table, and the found pieces of rows go where they belong.
    """

    @partial(jax.shard_map, in_specs=(TOKENS, P(TENSOR, FSDP)), out_specs=ACTIVATIONS)
    def local(tokens, table):
        everywhere = lax.all_gather(tokens, FSDP)
        places = everywhere - lax.axis_index(TENSOR) * table.shape[0]
        found = table.at[places].get(mode="fill", fill_value=0, wrap_negative_indices=False).astype(dtype)
        return lax.psum(lax.all_to_all(found, FSDP, split_axis=0, concat_axis=3, tiled=True)[0], TENSOR)

    return local(tokens, table)


def count_parameters(params: Params) -> int:
    """Numbers in the (possibly abstract) parameters."""
    return sum(prod(leaf.shape) for leaf in jax.tree.leaves(params))
