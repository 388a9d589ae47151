"""A decoder-only transformer: RMSNorm, RoPE, grouped-query attention, SwiGLU feed-forward.

The modules implement the formulas; `parallel.py` implements the sharding. Only attention mixes tokens, so sequences may
be in any layout. The attention function is an argument. The parameters of all layers are stacked along dim 0, which
`lax.scan` iterates over.
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
from jaxtyping import Array, Float, Int

from ringattn import config
from ringattn.attn.kernels.protocol import matmul_precision
from ringattn.mesh.axes import FSDP, TENSOR, TOKENS, VOCABULARY_MULTIPLE
from ringattn.model.parallel import (
    Params,
    all_logits,
    embed,
    init_normal,
    output_projection,
    qkv_projection,
    tensor_sum,
    token_wise,
)
from ringattn.model.rope import rotations

EPSILON = 1e-6

AttentionFunction = Callable[..., Float[Array, "B L H D"]]
"""Called as attention(query, key, value, segment_ids=segment_ids). Queries attend only within their segment."""


class RMSNorm(nnx.Module):
    """x / rms(x) * scale, computed in float32 and returned in the dtype of x (arXiv 1910.07467)."""

    def __init__(self, *shape: int):
        self.scale = nnx.Param(jnp.ones(shape, jnp.float32, out_sharding=P(*(None for _ in shape))))

    def __call__(self, x: Float[Array, "... E"]) -> Float[Array, "... E"]:
        x_f32 = x.astype(jnp.float32)
        x_f32 = x_f32 * lax.rsqrt(jnp.mean(x_f32 * x_f32, axis=-1, keepdims=True) + EPSILON)
        return (x_f32 * jnp.expand_dims(self.scale[...], range(x.ndim - 1))).astype(x.dtype)


class Attention(nnx.Module):
    """Grouped-query attention with RoPE, applied to norm(x)."""

    def __init__(self, c: config.Model, attend: AttentionFunction, rngs: nnx.Rngs):
        self.dtype, self.attend = c.dtype, attend
        heads, kv_heads = (c.layers, c.dim, c.heads, c.head_dim), (c.layers, c.dim, c.kv_heads, c.head_dim)
        std, output_std = c.dim**-0.5, (2 * c.layers * c.heads * c.head_dim) ** -0.5
        self.norm = RMSNorm(c.layers, c.dim)
        self.query = init_normal(rngs, heads, std, P(None, FSDP, TENSOR, None))
        self.key = init_normal(rngs, kv_heads, std, P(None, FSDP, TENSOR, None))
        self.value = init_normal(rngs, kv_heads, std, P(None, FSDP, TENSOR, None))
        self.output = init_normal(rngs, (c.layers, c.heads, c.head_dim, c.dim), output_std, P(None, TENSOR, None, FSDP))

    def __call__(
        self, x: Float[Array, "B L E"], angles: tuple[Array, Array], segment_ids: Int[Array, "B L"]
    ) -> Float[Array, "B L E"]:
        weights = self.query[...], self.key[...], self.value[...]
        query, key, value = qkv_projection(x, self.norm, weights, angles, self.dtype)
        heads = self.attend(query, key, value, segment_ids=segment_ids)
        return output_projection(heads, self.output[...], self.dtype)


class FeedForward(nnx.Module):
    """SwiGLU feed-forward network (arXiv 2002.05202)."""

    def __init__(self, c: config.Model, rngs: nnx.Rngs):
        shape, std = (c.layers, c.dim, c.feed_forward), (2 * c.layers * c.feed_forward) ** -0.5
        self.norm = RMSNorm(c.layers, c.dim)
        self.gate = init_normal(rngs, shape, c.dim**-0.5, P(None, FSDP, TENSOR))
        self.up = init_normal(rngs, shape, c.dim**-0.5, P(None, FSDP, TENSOR))
        self.down = init_normal(rngs, (c.layers, c.feed_forward, c.dim), std, P(None, TENSOR, FSDP))

    def __call__(self, x: Float[Array, "... E"]) -> Float[Array, "... E"]:
        matmul = partial(jnp.matmul, precision=matmul_precision(x.dtype))
        return tensor_sum(matmul(nnx.silu(matmul(x, self.gate[...])) * matmul(x, self.up[...]), self.down[...]))


class Layer(nnx.Module):
    """x = x + attention(norm(x)); x = x + feed_forward(norm(x)). Each module contains its norm."""

    def __init__(self, c: config.Model, attend: AttentionFunction, rngs: nnx.Rngs):
        self.dtype, self.in_chunks = c.dtype, c.remat != "off"
        self.attention, self.feed_forward = Attention(c, attend, rngs), FeedForward(c, rngs)

    def __call__(
        self, x: Float[Array, "B L E"], angles: tuple[Array, Array], segment_ids: Int[Array, "B L"]
    ) -> Float[Array, "B L E"]:
        x = x + self.attention(x, angles, segment_ids)
        # Chunks include the norm and the residual sum; otherwise both would be stored for all tokens.
        return token_wise(lambda ff, x: x + ff(ff.norm(x)), self.feed_forward, x, self.dtype, self.in_chunks)


def _save_all_but_parameters(primitive: Any, *_: Any, **__: Any) -> bool:
    """Saves everything except gathered parameters, which would make each device hold the whole model."""
    return primitive.name not in ("all_gather", "convert_element_type")


REMAT_POLICIES = {
    "off": _save_all_but_parameters,
    "on": jax.checkpoint_policies.save_only_these_names("attention_out", "attention_lse"),
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=["attention_lse"],
        names_which_can_be_offloaded=["layer_input", "attention_out"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}
"""Residuals that a layer saves besides its input, per `model.remat`. The output and log-sum-exp of attention are always
saved, so that K/V do not rotate a third time."""


class Transformer(nnx.Module):
    """Maps tokens to hidden states. The loss applies the output projection in chunks and never stores all logits.

    Create it under `jax.set_mesh` with an explicit mesh, preferably inside `jax.jit`, so that no device ever holds a
    whole parameter. The residual stream is in the compute dtype, because it dominates memory at long context; RMSNorm
    reads it in float32.
    """

    def __init__(self, c: config.Model, vocabulary: int, attention: AttentionFunction, rngs: nnx.Rngs):
        """Embedding tables are padded from `vocabulary` ids to a multiple of 128, so that they can be sharded."""
        self.config, self.vocabulary = c, vocabulary
        rows = -(-vocabulary // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
        self.embedding = init_normal(rngs, (rows, c.dim), 0.02, P(TENSOR, FSDP))
        self.layers = Layer(c, attention, rngs)
        self.norm = RMSNorm(c.dim)
        if not c.tied:
            self.unembedding = init_normal(rngs, (rows, c.dim), 0.02, P(TENSOR, FSDP))

    def __call__(
        self, tokens: Int[Array, "B L"], positions: Int[Array, "B L"], segment_ids: Int[Array, "B L"]
    ) -> Float[Array, "B L E"]:
        """Returns hidden states in the compute dtype, after the final norm.

        The arguments are int32, in the layout that `attention` expects. Positions are counted from the start of each
        segment.
        """
        tokens, positions, segment_ids = (jax.reshard(x, TOKENS) for x in (tokens, positions, segment_ids))
        angles = rotations(positions, self.config)
        graphdef, params = nnx.split(self.layers)

        def layer(x, params):
            x = checkpoint_name(x, "layer_input")
            return nnx.merge(graphdef, params)(x, angles, segment_ids), None

        layer = jax.checkpoint(layer, policy=REMAT_POLICIES[self.config.remat], prevent_cse=False)
        x, _ = lax.scan(layer, embed(tokens, self.embedding[...], self.config.dtype), params)
        return self.norm(x)

    def logits(
        self, tokens: Int[Array, "B L"], positions: Int[Array, "B L"], segment_ids: Int[Array, "B L"]
    ) -> Float[Array, "B L V"]:
        """Returns float32 next-token logits: B * L * V * 4 bytes, sharded over the data and context axes."""
        hidden = self(tokens, positions, segment_ids)
        return all_logits(hidden, self.output_table())[..., : self.vocabulary]

    def output_table(self) -> Float[Array, "V E"]:
        """Returns the output projection, float32 and sharded; rows >= `vocabulary` are padding."""
        return (self.embedding if self.config.tied else self.unembedding)[...]


def count_parameters(params: Params) -> int:
    """Returns the number of scalars in `params`, which may be abstract."""
    return sum(prod(leaf.shape) for leaf in jax.tree.leaves(params))
