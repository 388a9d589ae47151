"""A decoder-only transformer: RMSNorm, RoPE, grouped-query attention, gated feed-forward.

The modules implement the formulas; `parallel.py` implements the sharding and `families.py` lists what differs between
model families. Only attention mixes tokens, so sequences may be in any layout. The attention function is an argument.
The parameters of all layers are stacked along dim 0, which `pattern.py` scans over.
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
from ringattn.config.choices import LayerKind, Remat
from ringattn.mesh.axes import FSDP, TENSOR, TOKENS, VOCABULARY_MULTIPLE
from ringattn.model.families import (
    ACTIVATIONS,
    FAMILIES,
    layer_kinds,
    layer_pattern,
    logit_options,
    output_soft_cap,
)
from ringattn.model.parallel import (
    HeadGroup,
    Norms,
    Params,
    all_logits,
    embed,
    init_normal,
    output_projection,
    qkv_projection,
    tensor_sum,
    token_wise,
)
from ringattn.model.pattern import scan_layers
from ringattn.model.rope import local_rope, rotations

AttentionFunction = Callable[..., Float[Array, "B L H D"]]
"""Called as attention(query, key, value, segment_ids=..., mask=..., scale=..., soft_cap=...), which are those of
`ringattn.attention`."""


class RMSNorm(nnx.Module):
    """x / rms(x) * scale, computed in float32 and returned in the dtype of x (arXiv 1910.07467).

    With the family's `unit_offset`, multiplies by 1 + scale.
    """

    def __init__(self, c: config.Model, *shape: int):
        self.epsilon, self.unit_offset = c.norm_epsilon, FAMILIES[c.family].unit_offset
        initial = jnp.zeros if self.unit_offset else jnp.ones
        self.scale = nnx.Param(initial(shape, jnp.float32, out_sharding=P(*(None for _ in shape))))

    def __call__(self, x: Float[Array, "... E"]) -> Float[Array, "... E"]:
        x_f32 = x.astype(jnp.float32)
        x_f32 = x_f32 * lax.rsqrt(jnp.mean(x_f32 * x_f32, axis=-1, keepdims=True) + self.epsilon)
        return (x_f32 * jnp.expand_dims(self.factors(), range(x.ndim - 1))).astype(x.dtype)

    def factors(self) -> Float[Array, "... E"]:
        """Returns the factors of x / rms(x); those of all layers, if the module has them."""
        return 1 + self.scale[...] if self.unit_offset else self.scale[...]


class Attention(nnx.Module):
    """Grouped-query attention with RoPE, applied to norm(x)."""

    def __init__(self, c: config.Model, attend: AttentionFunction, rngs: nnx.Rngs):
        self.config, self.attend, family = c, attend, FAMILIES[c.family]
        heads, kv_heads = (c.layers, c.dim, c.heads, c.head_dim), (c.layers, c.dim, c.kv_heads, c.head_dim)
        std, output_std = c.dim**-0.5, (2 * c.layers * c.heads * c.head_dim) ** -0.5
        self.norm = RMSNorm(c, c.layers, c.dim)
        self.query = init_normal(rngs, heads, std, P(None, FSDP, TENSOR, None))
        self.key = init_normal(rngs, kv_heads, std, P(None, FSDP, TENSOR, None))
        self.value = init_normal(rngs, kv_heads, std, P(None, FSDP, TENSOR, None))
        self.output = init_normal(rngs, (c.layers, c.heads, c.head_dim, c.dim), output_std, P(None, TENSOR, None, FSDP))
        if family.qkv_bias:
            self.query_bias = _init_bias(c.layers, c.heads, c.head_dim)
            self.key_bias = _init_bias(c.layers, c.kv_heads, c.head_dim)
            self.value_bias = _init_bias(c.layers, c.kv_heads, c.head_dim)
        if family.qk_norm:
            self.query_norm, self.key_norm = (RMSNorm(c, c.layers, c.head_dim) for _ in range(2))
        if family.post_norms:
            self.post_norm = RMSNorm(c, c.layers, c.dim)

    def project(
        self, x: Float[Array, "B L E"], angles: tuple[Array, Array], group: HeadGroup | None = None
    ) -> tuple[Float[Array, "B L H D"], Float[Array, "B L G D"], Float[Array, "B L G D"]]:
        """Returns queries, keys and values of norm(x); with `group`, only those of its heads."""
        family = FAMILIES[self.config.family]
        norms = Norms(self.norm, *((self.query_norm, self.key_norm) if family.qk_norm else (None, None)))
        weights = self.query[...], self.key[...], self.value[...]
        biases = (self.query_bias[...], self.key_bias[...], self.value_bias[...]) if family.qkv_bias else None
        return qkv_projection(x, norms, weights, biases, angles, self.config.dtype, group)

    def heads(
        self,
        x: Float[Array, "B L E"],
        angles: tuple[Array, Array],
        segment_ids: Int[Array, "B L"] | None,
        kind: LayerKind,
    ) -> Float[Array, "B L H D"] | Float[Array, "groups B L h D"]:
        """Returns the output of all heads; with `head_groups`, group by group, as in UPipe (arXiv 2602.21196)."""

        def attend(group: HeadGroup | None) -> Float[Array, "B L h D"]:
            query, key, value = self.project(x, angles, group)
            return self.attend(query, key, value, segment_ids=segment_ids, **logit_options(self.config, kind))

        count = self.config.head_groups
        if count == 1:
            return attend(None)
        # Otherwise the queries, keys and values of all groups would be saved for the backward pass of the layer.
        one = jax.checkpoint(attend, policy=REMAT_POLICIES["on"], prevent_cse=False)
        return lax.map(lambda index: one(HeadGroup(index, count)), jnp.arange(count))

    def finish(self, heads: Float[Array, "B L H D"] | Float[Array, "groups B L h D"]) -> Float[Array, "B L E"]:
        """Projects the output of all heads to E."""
        x = output_projection(heads, self.output[...], self.config.dtype)
        return self.post_norm(x) if FAMILIES[self.config.family].post_norms else x


def _init_bias(*shape: int) -> nnx.Param:
    """Returns a bias [N, heads, D] of zeros, sharded over the tensor axis."""
    return nnx.Param(jnp.zeros(shape, jnp.float32, out_sharding=P(None, TENSOR, None)))


class FeedForward(nnx.Module):
    """Gated feed-forward network, SwiGLU or GeGLU by family (arXiv 2002.05202)."""

    def __init__(self, c: config.Model, rngs: nnx.Rngs):
        shape, std = (c.layers, c.dim, c.feed_forward), (2 * c.layers * c.feed_forward) ** -0.5
        self.config, self.norm = c, RMSNorm(c, c.layers, c.dim)
        self.gate = init_normal(rngs, shape, c.dim**-0.5, P(None, FSDP, TENSOR))
        self.up = init_normal(rngs, shape, c.dim**-0.5, P(None, FSDP, TENSOR))
        self.down = init_normal(rngs, (c.layers, c.feed_forward, c.dim), std, P(None, TENSOR, FSDP))
        if FAMILIES[c.family].post_norms:
            self.post_norm = RMSNorm(c, c.layers, c.dim)

    def __call__(self, x: Float[Array, "... E"]) -> Float[Array, "... E"]:
        family = FAMILIES[self.config.family]
        matmul, activation = partial(jnp.matmul, precision=matmul_precision(x.dtype)), ACTIVATIONS[family.activation]
        x = self.norm(x)
        x = tensor_sum(matmul(activation(matmul(x, self.gate[...])) * matmul(x, self.up[...]), self.down[...]))
        return self.post_norm(x) if family.post_norms else x


class Layer(nnx.Module):
    """x = x + attention(norm(x)); x = x + feed_forward(norm(x)). Each module contains its norm, and its post-norm."""

    def __init__(self, c: config.Model, attend: AttentionFunction, rngs: nnx.Rngs):
        self.dtype, self.in_chunks = c.dtype, c.remat != "off"
        self.attention, self.feed_forward = Attention(c, attend, rngs), FeedForward(c, rngs)

    def __call__(
        self,
        x: Float[Array, "B L E"],
        angles: tuple[Array, Array],
        segment_ids: Int[Array, "B L"] | None,
        kind: LayerKind,
    ) -> Float[Array, "B L E"]:
        return self.finish(x, self.attention.heads(x, angles, segment_ids, kind))

    def finish(
        self, x: Float[Array, "B L E"], heads: Float[Array, "B L H D"] | Float[Array, "groups B L h D"]
    ) -> Float[Array, "B L E"]:
        """Returns the output of the layer for its input `x` and the attention output of all heads."""
        x = x + self.attention.finish(heads)
        # Chunks include the norms and the residual sum; otherwise these would be stored for all tokens.
        return token_wise(lambda ff, x: x + ff(x), self.feed_forward, x, self.dtype, self.in_chunks)


def _save_all_but_parameters(primitive: Any, *_: Any, **__: Any) -> bool:
    """Saves everything except gathered parameters, which would make each device hold the whole model."""
    return primitive.name not in ("all_gather", "convert_element_type")


def _offloading(*names: str, saved: tuple[str, ...] = ()) -> Callable[..., Any]:
    """Returns a policy that keeps residuals of these names in host memory, and those in `saved` on the device."""
    return jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=saved,
        names_which_can_be_offloaded=names,
        offload_src="device",
        offload_dst="pinned_host",
    )


REMAT_POLICIES: dict[Remat, Callable[..., Any]] = {
    "off": _save_all_but_parameters,
    "on": jax.checkpoint_policies.save_only_these_names("attention_out", "attention_lse"),
    "offload": _offloading("layer_input", "attention_out", saved=("attention_lse",)),
    "offload_inputs": _offloading("layer_input"),
    "offload_groups": _offloading("layer_input", "attention_out", saved=("attention_lse",)),
}
"""Residuals that a layer saves besides its input, per `model.remat`. Where the output and log-sum-exp of attention are
saved, K/V do not rotate a third time. With "offload_groups", those of one group of layers at a time."""
GROUP_POLICY = _offloading("group_input")


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
        self.norm = RMSNorm(c, c.dim)
        if not c.tied:
            self.unembedding = init_normal(rngs, (rows, c.dim), 0.02, P(TENSOR, FSDP))

    def __call__(
        self, tokens: Int[Array, "B L"], positions: Int[Array, "B L"], segment_ids: Int[Array, "B L"] | None
    ) -> Float[Array, "B L E"]:
        """Returns hidden states in the compute dtype, after the final norm.

        The arguments are int32, in the layout that `attention` expects. Positions are counted from the start of each
        segment. Without segment ids, a row is one sequence.
        """
        tokens, positions, segment_ids = jax.reshard((tokens, positions, segment_ids), TOKENS)
        c, angles = self.config, layer_rotations(self.config, positions)
        graphdef, params = nnx.split(self.layers)

        def layer(kind: LayerKind):
            def apply(x, params):
                x = checkpoint_name(x, "layer_input")
                return nnx.merge(graphdef, params)(x, angles[kind], segment_ids, kind), None

            return apply

        x = self.scaled(embed(tokens, self.embedding[...], c.dtype))
        remat = partial(jax.checkpoint, policy=REMAT_POLICIES[c.remat], prevent_cse=False)
        remat_group = None
        if c.remat == "offload_groups":
            remat_group = partial(jax.checkpoint, policy=GROUP_POLICY, prevent_cse=False)
        return self.norm(scan_layers(layer, x, params, layer_pattern(c), remat, remat_group))

    def scaled(self, embeddings: Float[Array, "B L E"]) -> Float[Array, "B L E"]:
        """Returns the input of the first layer."""
        c = self.config
        if not FAMILIES[c.family].scaled_embedding:
            return embeddings
        return embeddings * jnp.asarray(c.dim**0.5, c.dtype)  # rounded to the compute dtype, as Gemma was trained

    def logits(
        self, tokens: Int[Array, "B L"], positions: Int[Array, "B L"], segment_ids: Int[Array, "B L"] | None
    ) -> Float[Array, "B L V"]:
        """Returns float32 next-token logits: B * L * V * 4 bytes, sharded over the data and context axes."""
        hidden = self(tokens, positions, segment_ids)
        return all_logits(hidden, self.output_table(), output_soft_cap(self.config))[..., : self.vocabulary]

    def output_table(self) -> Float[Array, "V E"]:
        """Returns the output projection, float32 and sharded; rows >= `vocabulary` are padding."""
        return (self.embedding if self.config.tied else self.unembedding)[...]


def layer_rotations(c: config.Model, positions: Int[Array, "B L"]) -> dict[LayerKind, tuple[Array, Array]]:
    """Returns `rope.rotations` for each kind of layer."""
    return {kind: rotations(positions, local_rope(c) if kind == "window" else c) for kind in layer_kinds(c)}


def count_parameters(params: Params) -> int:
    """Returns the number of scalars in `params`, which may be abstract."""
    return sum(prod(leaf.shape) for leaf in jax.tree.leaves(params))
