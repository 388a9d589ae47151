"""A decoder of the Llama kind: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

Parameters are float32 and lie in pieces: one dim over the FSDP axes, heads, feed-forward and vocabulary over the
tensor axis. `gather` makes them whole for the moment of use. All but attention is local to the token, so a row
may lie over the ring in any order; attention comes as a function.
"""

from collections.abc import Callable
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import P
from jaxtyping import Array, Float, Int

from ringattn import config
from ringattn.mesh import ACTIVATIONS, FSDP, TENSOR, VOCABULARY_MULTIPLE
from ringattn.model.rope import rotate, rotations

EPSILON = 1e-6

AttentionFunction = Callable[..., Float[Array, "B L H D"]]
"""Called as attention(query, key, value, segment_ids=segment_ids); a query sees keys of its own segment."""

Params = Any
"""An nnx.State: a tree of a model's parameters."""


def gather(parameter: nnx.Param, dtype: str) -> Float[Array, "..."]:
    """The parameter in `dtype`, whole but for the tensor axis: an all-gather over the FSDP axes.

    `reduced` says that each device's gradient of the whole is a summand yet to be added up, so that the gather's
    transpose is one reduce-scatter and not an all-reduce of which all but a piece is thrown away.
    """
    array = parameter[...]
    spec = jax.typeof(array).sharding.spec
    whole = P(*(None if axis == FSDP else axis for axis in spec), reduced=frozenset(FSDP))
    return jax.reshard(array.astype(dtype), whole)


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], std: float, spec: jax.sharding.PartitionSpec) -> nnx.Param:
    """A float32 parameter, drawn where it lies; the numbers depend on the seed alone, not on the mesh."""
    return nnx.Param(std * jax.random.normal(rngs.params(), shape, jnp.float32, out_sharding=spec))


class RMSNorm(nnx.Module):
    """x / rms(x) * scale, in float32; the result is in the dtype of x."""

    def __init__(self, dim: int):
        self.scale = nnx.Param(jnp.ones(dim, jnp.float32, out_sharding=P(None)))

    def __call__(self, x: Float[Array, "B L E"]) -> Float[Array, "B L E"]:
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + EPSILON)
        return (wide * self.scale[...][None, None, :]).astype(x.dtype)


class Attention(nnx.Module):
    def __init__(self, c: config.Model, attention: AttentionFunction, rngs: nnx.Rngs):
        self.dtype, self.attention = c.dtype, attention
        heads, groups = (c.dim, c.heads, c.head_dim), (c.dim, c.kv_heads, c.head_dim)
        std, back = c.dim**-0.5, (2 * c.layers * c.heads * c.head_dim) ** -0.5
        self.query = normal(rngs, heads, std, P(FSDP, TENSOR, None))
        self.key = normal(rngs, groups, std, P(FSDP, TENSOR, None))
        self.value = normal(rngs, groups, std, P(FSDP, TENSOR, None))
        self.output = normal(rngs, heads[1:] + heads[:1], back, P(TENSOR, None, FSDP))

    def __call__(
        self, x: Float[Array, "B L E"], angles: tuple[Array, Array], segment_ids: Int[Array, "B L"]
    ) -> Float[Array, "B L E"]:
        query, key, value = (
            jnp.einsum("ble,ehd->blhd", x, gather(weight, self.dtype)) for weight in (self.query, self.key, self.value)
        )
        mixed = self.attention(rotate(query, *angles), rotate(key, *angles), value, segment_ids=segment_ids)
        return jnp.einsum("blhd,hde->ble", mixed, gather(self.output, self.dtype), out_sharding=ACTIVATIONS)


class FeedForward(nnx.Module):
    def __init__(self, c: config.Model, rngs: nnx.Rngs):
        self.dtype = c.dtype
        self.gate = normal(rngs, (c.dim, c.feed_forward), c.dim**-0.5, P(FSDP, TENSOR))
        self.up = normal(rngs, (c.dim, c.feed_forward), c.dim**-0.5, P(FSDP, TENSOR))
        self.down = normal(rngs, (c.feed_forward, c.dim), (2 * c.layers * c.feed_forward) ** -0.5, P(TENSOR, FSDP))

    def __call__(self, x: Float[Array, "B L E"]) -> Float[Array, "B L E"]:
        gate, up = (jnp.einsum("ble,ef->blf", x, gather(weight, self.dtype)) for weight in (self.gate, self.up))
        return jnp.einsum("blf,fe->ble", nnx.silu(gate) * up, gather(self.down, self.dtype), out_sharding=ACTIVATIONS)


class Layer(nnx.Module):
    def __init__(self, c: config.Model, attention: AttentionFunction, rngs: nnx.Rngs):
        self.attention_norm, self.attention = RMSNorm(c.dim), Attention(c, attention, rngs)
        self.feed_forward_norm, self.feed_forward = RMSNorm(c.dim), FeedForward(c, rngs)

    def __call__(
        self, x: Float[Array, "B L E"], angles: tuple[Array, Array], segment_ids: Int[Array, "B L"]
    ) -> Float[Array, "B L E"]:
        x = x + self.attention(self.attention_norm(x), angles, segment_ids)
        return x + self.feed_forward(self.feed_forward_norm(x))


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
        self.layers = nnx.List([Layer(c, attention, rngs) for _ in range(c.layers)])
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
        x = gather(self.embedding, self.config.dtype).at[tokens].get(out_sharding=ACTIVATIONS)
        angles = rotations(positions, self.config.head_dim, self.config.rope_theta)
        for layer in self.layers:
            x = layer(x, angles, segment_ids)
        return self.norm(x)

    def output(self) -> Float[Array, "V E"]:
        """The output projection in the compute dtype, in pieces as the parameter lies: the loss gathers it."""
        return (self.embedding if self.config.tied else self.unembedding)[...].astype(self.config.dtype)


def count_parameters(params: Params) -> int:
    """Numbers in the (possibly abstract) parameters."""
    return sum(prod(leaf.shape) for leaf in jax.tree.leaves(params))
