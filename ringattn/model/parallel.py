"""Sharding of the model: parameter all-gathers, sharded projections and embedding.

Parameters are float32. One dim is sharded over the FSDP axes; heads, feed-forward and vocabulary are sharded over the
tensor axis. Each layer all-gathers its parameters just before it uses them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax import P, lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from ringattn.attn.kernels.protocol import matmul_precision
from ringattn.mesh.axes import ACTIVATIONS, FSDP, HEADS, TENSOR, TOKENS
from ringattn.model.rope import rotate

CHUNK = 1024
"""Number of tokens of each local sequence that `token_wise` computes at a time with `in_chunks`."""

EMBEDDED = 2**20
"""Number of tokens, of all devices together, that `embed` looks up at a time. A device's columns of the table are few,
and TPUs pad them to 128: 256 bytes per token in bfloat16."""

Params = Any
"""An nnx.State: the parameters of a model as a pytree."""
Module = TypeVar("Module")


def all_gather_param(shard: Float[Array, "..."], dtype: DTypeLike, dim: int) -> Float[Array, "..."]:
    """All-gathers a parameter along `dim` over the FSDP axes, in `dtype`. Call it inside a shard_map.

    The gradient is reduce-scattered in float32, the dtype of the parameter.
    """
    return _all_gather(shard, dtype, dim)


def _gather(shard: Array, dtype: DTypeLike, dim: int) -> Array:
    # With a cast alone, the TPU compiler hoists the cast out of the loop over layers and keeps all layers' parameters
    # in `dtype` at once. reduce_precision prevents this.
    info = jnp.finfo(dtype)
    rounded = lax.reduce_precision(shard, info.nexp, info.nmant)
    return lax.all_gather(rounded.astype(dtype), FSDP, axis=dim, tiled=True)


def _gather_forward(shard: Array, dtype: DTypeLike, dim: int) -> tuple[Array, None]:
    return _gather(shard, dtype, dim), None


def _gather_backward(dtype: DTypeLike, dim: int, _: None, gradient: Array) -> tuple[Array]:
    return (lax.psum_scatter(gradient.astype(jnp.float32), FSDP, scatter_dimension=dim, tiled=True),)


_all_gather: Any = jax.custom_vjp(_gather, nondiff_argnums=(1, 2))
_all_gather.defvjp(_gather_forward, _gather_backward)


def init_normal(rngs: nnx.Rngs, shape: tuple[int, ...], std: float, spec: jax.P) -> nnx.Param:
    """Returns a float32 parameter, normally distributed and created sharded. Its values do not depend on the mesh."""
    return nnx.Param(std * jax.random.normal(rngs.params(), shape, jnp.float32, out_sharding=spec))


def tensor_sum(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Sums partial products over the tensor axis, over which heads and feed-forward are sharded."""
    return lax.psum(x, TENSOR)


@partial(jax.tree_util.register_dataclass, data_fields=["index"], meta_fields=["count"])
@dataclass(frozen=True)
class HeadGroup:
    """Group `index` of `count` groups of heads: as many consecutive heads of each tensor shard."""

    index: Int[Array, ""]
    count: int

    def of(self, x: Array, dim: int) -> Array:
        """Returns the heads of this group of a local array whose heads are dim `dim`."""
        size = x.shape[dim] // self.count
        return lax.dynamic_slice_in_dim(x, self.index * size, size, dim)


class Norms(NamedTuple):
    """RMSNorms of the qkv projection: of its input, and of queries and keys (None: without)."""

    input: nnx.Module
    query: nnx.Module | None
    key: nnx.Module | None


def qkv_projection(
    x: Float[Array, "B L E"],
    norms: Norms,
    weights: tuple[Array, Array, Array],
    biases: tuple[Array, Array, Array] | None,
    angles: tuple[Array, Array],
    dtype: DTypeLike,
    group: HeadGroup | None = None,
) -> tuple[Float[Array, "B L H D"], Float[Array, "B L G D"], Float[Array, "B L G D"]]:
    """Projects norm(x) to queries, keys and values with `weights` [E, heads, D] and optional `biases` [heads, D].

    With `group`, only those of its heads. Queries and keys are then normalized, if `norms` has norms for them, and
    rotated by RoPE. The norms, whose parameters are replicated, run in the same shard_map, so that XLA fuses them with
    the projections.
    """
    graphdef, params = nnx.split(norms)
    rotary = P(*TOKENS, None, None)
    specs = (ACTIVATIONS, P(), P(FSDP, TENSOR, None), P(TENSOR, None), (rotary, rotary), P())

    @partial(jax.shard_map, in_specs=specs, out_specs=HEADS)
    def local(x, params, weights, biases, angles, group):
        input_norm, query_norm, key_norm = nnx.merge(graphdef, params)
        x = input_norm(x)
        if group is not None:
            weights, biases = (
                jax.tree.map(lambda each: group.of(each, each.ndim - 2), part) for part in (weights, biases)
            )
        project = partial(jnp.einsum, "ble,ehd->blhd", precision=matmul_precision(dtype))
        heads = [project(x, all_gather_param(each, dtype, 0)) for each in weights]
        if biases is not None:
            # In float32, so that the gradients of the biases are summed in float32.
            sums = (x.astype(jnp.float32) + bias[None, None] for x, bias in zip(heads, biases, strict=True))
            heads = [x.astype(dtype) for x in sums]
        query, key, value = heads
        query, key = (x if norm is None else norm(x) for x, norm in ((query, query_norm), (key, key_norm)))
        return rotate(query, *angles), rotate(key, *angles), value

    return local(x, params, weights, biases, angles, group)


def output_projection(
    heads: Float[Array, "B L H D"] | Float[Array, "groups B L h D"], weight: Float[Array, "H D E"], dtype: DTypeLike
) -> Float[Array, "B L E"]:
    """Projects the attention output of all heads, also by groups (see `HeadGroup`), to E, summed over heads."""
    in_groups = heads.ndim == 5
    heads_spec = P(None, *HEADS) if in_groups else HEADS

    @partial(jax.shard_map, in_specs=(heads_spec, P(TENSOR, None, FSDP)), out_specs=ACTIVATIONS)
    def local(heads, weight):
        weight = all_gather_param(weight, dtype, 2)
        if in_groups:
            weight = rearrange(weight, "(groups heads) d e -> groups heads d e", groups=heads.shape[0])
        dims = "gblhd,ghde->ble" if in_groups else "blhd,hde->ble"
        return tensor_sum(jnp.einsum(dims, heads, weight, precision=matmul_precision(dtype)))

    return local(heads, weight)


def token_wise(
    f: Callable[[Module, Float[Array, "... E"]], Float[Array, "... E"]],
    module: Module,
    x: Float[Array, "B L E"],
    dtype: DTypeLike,
    in_chunks: bool,
) -> Float[Array, "B L E"]:
    """Returns f(module, x), computed on local tokens with all-gathered parameters. `f` must not mix tokens.

    With `in_chunks`, computes CHUNK tokens of each local sequence at a time, and rematerializes each chunk in the
    backward pass.
    """
    graphdef, params = nnx.split(module)
    specs = jax.tree.map(lambda leaf: jax.typeof(leaf).sharding.spec, params)
    if in_chunks:  # Without this barrier XLA keeps gathered parameters, or their gradients, alive during attention.
        x, params = lax.optimization_barrier((x, params))

    @partial(jax.shard_map, in_specs=(specs, ACTIVATIONS), out_specs=ACTIVATIONS)
    def local(params, x):
        # Keep float32 and cast inside each chunk, so that chunk gradients accumulate in float32.
        params_f32 = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), _gather_params(params, specs, dtype))

        def chunk(x):
            cast = jax.tree.map(lambda leaf, spec: leaf.astype(dtype) if FSDP in spec else leaf, params_f32, specs)
            return f(nnx.merge(graphdef, cast), x)

        if not in_chunks:
            return chunk(x)
        by_position = lax.map(jax.checkpoint(chunk), jnp.moveaxis(x, 1, 0), batch_size=CHUNK)
        return jnp.moveaxis(by_position, 0, 1)

    return local(params, x)


def _gather_params(params: Params, specs: Params, dtype: DTypeLike) -> Params:
    """All-gathers parameters that are sharded over the FSDP axes. Replicated ones (norm scales) stay float32."""

    def gathered(leaf, spec):
        return all_gather_param(leaf, dtype, spec.index(FSDP)) if FSDP in spec else leaf

    return jax.tree.map(gathered, params, specs)


@partial(jax.jit, static_argnums=2)
def embed(tokens: Int[Array, "B L"], table: Float[Array, "V E"], dtype: str) -> Float[Array, "B L E"]:
    """Looks up `tokens` in the sharded embedding `table`, in `dtype`; the gradient of the table is float32.

    Each device looks up the tokens of all devices in its shard of the table. An all-to-all then sends the embedding
    columns to the devices that hold the tokens. Long rows are looked up in parts of EMBEDDED tokens.
    """

    @partial(jax.shard_map, in_specs=(TOKENS, P(TENSOR, FSDP)), out_specs=ACTIVATIONS)
    def local(tokens, table):
        def lookup(tokens):
            all_tokens = lax.all_gather(tokens, FSDP)
            rows = all_tokens - lax.axis_index(TENSOR) * table.shape[0]
            columns = table.at[rows].get(mode="fill", fill_value=0, wrap_negative_indices=False).astype(dtype)
            return lax.psum(lax.all_to_all(columns, FSDP, split_axis=0, concat_axis=3, tiled=True)[0], TENSOR)

        length, most = tokens.shape[1], EMBEDDED // lax.axis_size(FSDP)
        size = math.gcd(length, 2 ** max(most.bit_length() - 1, 0))
        if length <= most or size < most // 16:  # too few tokens, or too many parts
            return lookup(tokens)
        parts = lax.map(lookup, rearrange(tokens, "b (parts part) -> parts b part", part=size))
        return rearrange(parts, "parts b part e -> b (parts part) e")

    return local(tokens, table)


def soft_capped(logits: Float[Array, "*dims"], cap: float | None) -> Float[Array, "*dims"]:
    """Returns cap * tanh(logits / cap), or `logits` without a cap."""
    return logits if cap is None else cap * jnp.tanh(logits / cap)


def all_logits(
    hidden: Float[Array, "B L E"], output: Float[Array, "V E"], soft_cap: float | None
) -> Float[Array, "B L V"]:
    """Returns soft-capped hidden @ output.T in float32, sharded like the tokens, replicated over the tensor axis."""

    @partial(jax.shard_map, in_specs=(ACTIVATIONS, P(TENSOR, FSDP)), out_specs=P(*TOKENS, TENSOR))
    def local(hidden, output):
        rows = all_gather_param(output, hidden.dtype, 1)
        options = {"precision": matmul_precision(hidden.dtype), "preferred_element_type": jnp.float32}
        return soft_capped(jnp.einsum("ble,ve->blv", hidden, rows, **options), soft_cap)

    return jax.reshard(local(hidden, output), P(*TOKENS, None))
