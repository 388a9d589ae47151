"""What is compared: each subject as one function of the same arrays, laid out over the devices as it wants them."""

import importlib
import math
import types
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.extend
import jax.lib
import jax.numpy as jnp
import numpy as np
from jax import P

from ringattn.attention import Mask, attention
from ringattn.config import Subject
from ringattn.layout import permute
from ringattn.mesh import CONTEXT, HEADS, SEQUENCE, TOKENS, place

Attend = Callable[..., Any]
"""attend(query, key, value, segment_ids) -> out; segment_ids are None for a row of one document."""


@dataclass(frozen=True)
class Case:
    """The one row of tokens that all subjects of a group attend over, causally."""

    length: int
    shards: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str


class Inputs(NamedTuple):
    """query and d_out (the output's gradient) [1, L, H, D], key and value [1, L, G, D], segment_ids [1, L] or None."""

    query: Any
    key: Any
    value: Any
    d_out: Any
    segment_ids: Any


def draw(case: Case, documents: int) -> Inputs:
    """NumPy arrays in natural order, always the same; documents of equal length, up to a token."""
    random = np.random.default_rng(0)

    def array(heads: int) -> np.ndarray:
        drawn = random.standard_normal((1, case.length, heads, case.head_dim), np.float32)
        return drawn.astype(jnp.dtype(case.dtype))

    query, key, value = array(case.heads), array(case.kv_heads), array(case.kv_heads)
    ids = (np.arange(case.length, dtype=np.int64) * documents // case.length).astype(np.int32)[None]
    return Inputs(query, key, value, array(case.heads), ids if documents > 1 else None)


def placed_inputs(subject: Subject, case: Case, mesh: jax.sharding.Mesh) -> Inputs:
    """The drawn arrays on the devices: on the first alone for 'dense', else over the ring, in the layout's order."""
    inputs = draw(case, subject.documents)
    if subject.method == "dense":
        return jax.device_put(inputs, mesh.devices.flat[0])
    laid = jax.tree.map(lambda x: permute(x, subject.layout, case.shards), inputs)
    tokens = P() if subject.method == "ringattention" else TOKENS  # there every device knows all documents
    ids = place(laid.segment_ids, mesh, tokens)
    return place(laid._replace(segment_ids=None), mesh, HEADS)._replace(segment_ids=ids)


def make_attend(subject: Subject, mesh: jax.sharding.Mesh) -> Attend:
    """The subject's function of global arrays as `placed_inputs` lays them.

    Raises ModuleNotFoundError if the subject is not installed. What else a subject cannot do it says, by a ValueError,
    when it is traced.
    """
    if subject.method == "dense":
        return lambda query, key, value, ids: jax.nn.dot_product_attention(query, key, value, is_causal=True)
    if subject.method == "ringattention":
        return _ringattention(mesh)
    window = None if subject.window is None else (subject.window, 0)
    settings = {"mask": Mask(causal=True, window=window), "layout": subject.layout, "strategy": subject.method}
    return lambda query, key, value, ids: attention(query, key, value, segment_ids=ids, axis=SEQUENCE, **settings)


def _ringattention(mesh: jax.sharding.Mesh) -> Attend:
    """`ring_attention` of PyPI ringattention 0.1.2, by the authors of arXiv 2310.01889, in JAX for every device."""
    ring_attention = _import_ring_attention()

    def attend(query: Any, key: Any, value: Any, ids: Any) -> Any:
        heads, kv_heads, length = query.shape[2], key.shape[2], query.shape[1]
        if heads != kv_heads:
            raise ValueError(f"ringattention needs a K/V head for each query head: {heads} and {kv_heads} do not agree")
        chunk = math.gcd(length // mesh.shape[CONTEXT], 512)
        settings = {"causal_block_size": 1, "query_chunk_size": chunk, "key_chunk_size": chunk}
        settings |= {"deterministic": True, "dropout_rng": None, "attn_pdrop": 0.0, "dtype": jnp.float32}
        settings |= {"policy": jax.checkpoint_policies.nothing_saveable, "precision": None, "prevent_cse": True}

        def local(query: Any, key: Any, value: Any, ids: Any) -> Any:
            # Without a bias, and for one document without ids, it has less to do.
            return ring_attention(query, key, value, None, ids, None, CONTEXT, True, settings)

        specs = (HEADS, HEADS, HEADS, P())
        return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=HEADS, check_vma=False)(query, key, value, ids)

    return attend


def _import_ring_attention() -> Any:
    """Importing ringattention asks `jax.lib.xla_bridge` for the platform, which jax 0.8 and newer no longer have."""
    names: Any = vars(jax.lib)
    names["xla_bridge"] = types.SimpleNamespace(get_backend=jax.extend.backend.get_backend)
    try:
        ring_attention: Any = importlib.import_module("ringattention.ringattention_jax").ring_attention
    except ModuleNotFoundError as error:
        if error.name != "ringattention":
            raise
        cure = "pip install -e '.[benchmark]'"
        raise ModuleNotFoundError(f"the package ringattention is not installed: {cure}", name=error.name) from None
    finally:
        del names["xla_bridge"]
    return ring_attention


PASSES: dict[str, int] = {"forward": 1, "forward+backward": 3}
"""What is timed, and its useful work in forward passes: a backward pass has twice the products, not recomputing any."""


def make_pass(name: str, attend: Attend) -> Callable[[Inputs], Any]:
    """The output; with 'forward+backward' also the gradients of query, key and value."""

    def forward(inputs: Inputs) -> Any:
        return attend(inputs.query, inputs.key, inputs.value, inputs.segment_ids)

    def forward_backward(inputs: Inputs) -> Any:
        of_arrays = partial(_with_ids, attend, inputs.segment_ids)
        out, pull = jax.vjp(of_arrays, inputs.query, inputs.key, inputs.value)
        return out, pull(inputs.d_out)

    return {"forward": forward, "forward+backward": forward_backward}[name]


def _with_ids(attend: Attend, ids: Any, query: Any, key: Any, value: Any) -> Any:
    return attend(query, key, value, ids)


def useful_flops(subject: Subject, case: Case, pass_: str) -> int:
    """FLOPs of the products of queries, keys and values that may see each other, and no others: 4 D a pair and head."""
    left = case.length if subject.window is None else subject.window + 1
    position = np.arange(case.length, dtype=np.int64)
    begin = -(-(position * subject.documents // case.length) * case.length // subject.documents)  # of its document
    seen = np.minimum(position - begin + 1, left)
    return 4 * case.head_dim * case.heads * int(seen.sum()) * PASSES[pass_]
