"""The subjects (methods to compare): functions of the same arrays, sharded as each subject requires."""

import importlib
import math
import types
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.extend
import jax.lib
import jax.numpy as jnp
import numpy as np
from jax import P

from ringattn.attn.attention import attention
from ringattn.attn.mask import Mask
from ringattn.config import Subject
from ringattn.cost.flops import attention_flops, visible_pairs
from ringattn.layout import permute
from ringattn.mesh.axes import CONTEXT, HEADS, SEQUENCE, TOKENS, place

Array: TypeAlias = np.ndarray | jax.Array

Attend: TypeAlias = Callable[..., jax.Array]
"""attend(query, key, value, segment_ids) -> out. segment_ids is None for a row of one document."""

PASSES: dict[str, int] = {"forward": 1, "forward+backward": 3}
"""Timed passes and their useful FLOPs relative to a forward pass: backward is twice forward, without recomputation."""


@dataclass(frozen=True)
class Case:
    """One row of tokens, the same for all subjects of a comparison. Attention is causal."""

    length: int
    shards: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str


class Inputs(NamedTuple):
    """query and d_out (the output's gradient) [1, L, H, D], key and value [1, L, G, D], segment_ids [1, L] or None."""

    query: Array
    key: Array
    value: Array
    d_out: Array
    segment_ids: Array | None


def draw_inputs(case: Case, documents: int) -> Inputs:
    """Random NumPy arrays in natural order, always the same. Lengths of documents differ by at most one token."""
    random = np.random.default_rng(0)

    def array(heads: int) -> np.ndarray:
        drawn = random.standard_normal((1, case.length, heads, case.head_dim), np.float32)
        return drawn.astype(jnp.dtype(case.dtype))

    query, key, value = array(case.heads), array(case.kv_heads), array(case.kv_heads)
    ids = segment_ids(case.length, documents)[None] if documents > 1 else None
    return Inputs(query, key, value, array(case.heads), ids)


def segment_ids(length: int, documents: int) -> np.ndarray:
    """int32 [length]: the document of each token."""
    return (np.arange(length, dtype=np.int64) * documents // length).astype(np.int32)


def place_inputs(subject: Subject, case: Case, mesh: jax.sharding.Mesh) -> Inputs:
    """Draws the arrays and places them: on the first device for 'dense', else sharded over the ring in the layout."""
    inputs = draw_inputs(case, subject.documents)
    if subject.method == "dense":
        return jax.device_put(inputs, mesh.devices.flat[0])
    permuted = jax.tree.map(lambda x: permute(x, subject.layout, case.shards), inputs)
    ids_spec = P() if subject.method == "ringattention" else TOKENS  # ringattention takes the ids of the whole row
    ids = place(permuted.segment_ids, mesh, ids_spec)
    return place(permuted._replace(segment_ids=None), mesh, HEADS)._replace(segment_ids=ids)


def make_attend(subject: Subject, mesh: jax.sharding.Mesh) -> Attend:
    """Returns the subject as a function of arrays from `place_inputs`.

    Raises ModuleNotFoundError if the subject is not installed. The function raises ValueError when it is traced with
    shapes that the subject does not support.
    """
    if subject.method == "dense":
        return lambda query, key, value, ids: jax.nn.dot_product_attention(query, key, value, is_causal=True)
    if subject.method == "ringattention":
        return _ringattention(mesh)
    window = None if subject.window is None else (subject.window, 0)
    settings = {"mask": Mask(causal=True, window=window), "layout": subject.layout, "strategy": subject.method}
    return lambda query, key, value, ids: attention(query, key, value, segment_ids=ids, axis=SEQUENCE, **settings)


def _ringattention(mesh: jax.sharding.Mesh) -> Attend:
    """`ring_attention` of PyPI ringattention 0.1.2 (arXiv 2310.01889): its plain JAX version, for any device."""
    ring_attention = _import_ring_attention()

    def attend(query: jax.Array, key: jax.Array, value: jax.Array, ids: jax.Array | None) -> jax.Array:
        heads, kv_heads, length = query.shape[2], key.shape[2], query.shape[1]
        if heads != kv_heads:
            raise ValueError(f"kv_heads={kv_heads} must equal heads={heads} for ringattention; use --kv_heads {heads}")
        chunk = math.gcd(length // mesh.shape[CONTEXT], 512)
        settings = {"causal_block_size": 1, "query_chunk_size": chunk, "key_chunk_size": chunk}
        settings |= {"deterministic": True, "dropout_rng": None, "attn_pdrop": 0.0, "dtype": jnp.float32}
        settings |= {"policy": jax.checkpoint_policies.nothing_saveable, "precision": None, "prevent_cse": True}

        def local(query: jax.Array, key: jax.Array, value: jax.Array, ids: jax.Array | None) -> jax.Array:
            # Without a bias, and without ids for a single document, it computes less.
            return ring_attention(query, key, value, None, ids, None, CONTEXT, True, settings)

        specs = (HEADS, HEADS, HEADS, P())
        return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=HEADS, check_vma=False)(query, key, value, ids)

    return attend


def _import_ring_attention() -> Callable[..., jax.Array]:
    """Imports ringattention. Supplies `jax.lib.xla_bridge`, which it requires and which jax 0.8 removed."""
    names: Any = vars(jax.lib)
    names["xla_bridge"] = types.SimpleNamespace(get_backend=jax.extend.backend.get_backend)
    try:
        return importlib.import_module("ringattention.ringattention_jax").ring_attention
    except ModuleNotFoundError as error:
        if error.name != "ringattention":
            raise
        fix = "pip install -e '.[benchmark]'"
        raise ModuleNotFoundError(f"the package ringattention is not installed: {fix}", name=error.name) from None
    finally:
        del names["xla_bridge"]


def make_pass(name: str, attend: Attend) -> Callable[[Inputs], Any]:
    """Returns the timed function: the output; for 'forward+backward' also the gradients of query, key and value."""

    def forward(inputs: Inputs) -> jax.Array:
        return attend(inputs.query, inputs.key, inputs.value, inputs.segment_ids)

    def forward_backward(inputs: Inputs) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
        attend_arrays = partial(_attend_with_ids, attend, inputs.segment_ids)
        out, pull = jax.vjp(attend_arrays, inputs.query, inputs.key, inputs.value)
        return out, pull(inputs.d_out)

    return {"forward": forward, "forward+backward": forward_backward}[name]


def _attend_with_ids(attend: Attend, ids: Array | None, query: Array, key: Array, value: Array) -> jax.Array:
    return attend(query, key, value, ids)


def useful_flops(subject: Subject, case: Case, pass_: str) -> int:
    """FLOPs of the matrix products of attention for the visible pairs of queries and keys."""
    ids = segment_ids(case.length, subject.documents)
    positions = np.arange(case.length, dtype=np.int32) - np.searchsorted(ids, ids).astype(np.int32)
    pairs = visible_pairs(positions[None], ids[None], subject.window)
    return attention_flops(case.heads, case.head_dim, pairs) * PASSES[pass_]
