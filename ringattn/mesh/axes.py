"""Mesh axis names, partition specs and array placement. No other file spells out mesh axis names."""

import math
from collections.abc import Mapping
from typing import Any

import jax
from jax import P

DATA, CONTEXT_OUTER, CONTEXT, TENSOR = "data", "context_outer", "context", "tensor"
"""The batch is sharded over `data`, the sequence over `context_outer` and `context`, and heads, feed-forward and
vocabulary over `tensor`."""
AXES: tuple[str, ...] = (DATA, CONTEXT_OUTER, CONTEXT, TENSOR)
SEQUENCE = (CONTEXT_OUTER, CONTEXT)
"""Axes over which the sequence is sharded: the `axis` argument of attention."""
FSDP = (DATA, *SEQUENCE)
"""Axes over which parameters, gradients and optimizer state are sharded: a ring of 64 stores 1/64 of the model per
device."""
TOKENS = P(DATA, SEQUENCE)
"""Spec of token arrays [B, L]."""
ACTIVATIONS = P(DATA, SEQUENCE, None)
"""Spec of activations [B, L, E]."""
HEADS = P(DATA, SEQUENCE, TENSOR, None)
"""Spec of queries, keys and values [B, L, H, D]."""
VOCABULARY_MULTIPLE = 128
"""The vocabulary is padded to a multiple of this, so that it divides over the tensor axis."""


def context_shards(mesh: jax.sharding.Mesh) -> int:
    """Returns the number of devices over which each sequence is sharded."""
    return sequence_shards(mesh.shape)


def sequence_shards(sizes: Mapping[str, int]) -> int:
    """Returns `context_shards` of a mesh with axes of `sizes`."""
    return math.prod(sizes[name] for name in SEQUENCE)


def describe_sizes(sizes: Mapping[str, int]) -> str:
    """Returns axis sizes as text: 'data=2 x context=4 x tensor=1'. Omits context_outer=1."""
    return " x ".join(f"{name}={size}" for name, size in sizes.items() if name != CONTEXT_OUTER or size != 1)


def place(tree: Any, mesh: jax.sharding.Mesh, spec: jax.sharding.PartitionSpec) -> Any:
    """Returns global arrays sharded by `spec`, from NumPy arrays that are complete in every process."""
    sharding = jax.sharding.NamedSharding(mesh, spec)
    return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index]), tree)


def abstract(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    """Adds `mesh` to the shardings of `jax.eval_shape` results. Leaves without a spec are replicated."""

    def with_mesh(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        spec = P() if leaf.sharding is None else leaf.sharding.spec
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=jax.NamedSharding(mesh, spec))

    return jax.tree.map(with_mesh, tree)
