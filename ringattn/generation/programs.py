"""The compiled programs of generation: one per chunk length, batch size and capacity of the cache."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import P
from jax.experimental.layout import Format, Layout
from jaxtyping import Array, Bool, Float, Int

from ringattn import config
from ringattn.generation.cache import Cache
from ringattn.generation.decode import decode
from ringattn.generation.prefill import Chunk, logits_at, prefill
from ringattn.generation.sampling import Values, choose
from ringattn.mesh.axes import FSDP, place
from ringattn.model.build import model_factory
from ringattn.model.families import output_soft_cap
from ringattn.model.loss import token_scores
from ringattn.model.parallel import Params
from ringattn.model.transformer import Transformer


class Pending(NamedTuple):
    """State between two steps of decoding, replicated."""

    logits: Float[Array, "B V"]
    """Logits of the next token."""
    seen: Bool[Array, "B V"] | None
    """The tokens that each row contains; None in greedy decoding."""
    count: Int[Array, ""]
    """Number of tokens sampled before."""
    tokens: Int[Array, " B"]
    """The last sampled tokens."""
    log_probs: Float[Array, " B"]
    """Their log-probabilities."""


@dataclass(frozen=True)
class Programs:
    """Jitted functions for one model. Call them under the mesh.

    They take the parameters in the compute dtype: see `compute_params`.
    """

    extend: Callable[[Params, Cache, Cache | None, Chunk], tuple[Cache, Float[Array, "B L E"]]]
    """Appends a chunk of the prompt to each row: see `prefill.prefill`. The old cache must not be used again."""
    pick: Callable[[Params, Array, Array, Array, Array], Float[Array, "B V"]]
    """pick(params, hidden, index, chosen, logits): the logits, replaced for chosen rows by those of token `index`."""
    score: Callable[[Params, Array, Array], tuple[Float[Array, "B L"], Int[Array, "B L"]]]
    """score(params, hidden, targets): -log p(target) and the most likely token of each token of a chunk."""
    step: Callable[..., tuple[Cache, Pending]]
    """step(params, cache, base, pending, keys, values): samples a token per row and appends it to the cache."""


@lru_cache(maxsize=8)
def make_programs(c: config.Model, mesh: jax.sharding.Mesh) -> Programs:
    """Returns the programs of a model whose vocabulary is set. Generators of equal models share them."""
    assert c.vocabulary is not None
    with jax.set_mesh(mesh):
        graphdef = nnx.graphdef(nnx.eval_shape(model_factory(config.Config(model=c), c.vocabulary)))

    def model(params: Params) -> Transformer:
        return nnx.merge(graphdef, params)

    @partial(jax.jit, donate_argnums=1)
    def extend(params: Params, cache: Cache, base: Cache | None, chunk: Chunk):
        return prefill(model(params), cache, base, chunk)

    @jax.jit
    def pick(params: Params, hidden: Array, index: Array, chosen: Array, logits: Array):
        return jnp.where(chosen[:, None], logits_at(model(params), hidden, index), logits)

    @jax.jit
    def score(params: Params, hidden: Array, targets: Array):
        table = model(params).output_table().astype(jnp.float32)
        assert c.vocabulary is not None
        return token_scores(hidden, table, targets, c.vocabulary, output_soft_cap(c))

    @partial(jax.jit, donate_argnums=1)
    def step(params: Params, cache: Cache, base: Cache | None, pending: Pending, keys: Any, values: Values):
        sampling_keys = None if keys is None else jax.vmap(lambda key: jax.random.fold_in(key, pending.count))(keys)
        tokens, log_probs = choose(pending.logits, pending.seen, sampling_keys, values)
        seen = pending.seen
        if seen is not None:
            seen |= jax.nn.one_hot(tokens, seen.shape[1], dtype=bool)
        cache, logits = decode(model(params), cache, base, tokens)
        return cache, Pending(logits, seen, pending.count + 1, tokens, log_probs)

    return Programs(extend, pick, score, step)


def compute_params(params: Params, dtype: str) -> Params:
    """Returns parameters with the matrices in `dtype`, as training casts them in each layer. Others stay float32."""
    if dtype == "float32":
        return params

    @partial(jax.jit, out_shardings=jax.tree.map(lambda x: compute_format(x, dtype), params))
    def cast(params: Params) -> Params:
        return jax.tree.map(lambda x: x.astype(dtype) if FSDP in jax.typeof(x).sharding.spec else x, params)

    return cast(params)


def compute_format(x: Any, dtype: str) -> Any:
    """Returns the sharding of a parameter in the compute dtype, with the order in memory if that is not the default.

    A TPU reads a projection to heads, [N, E, H, D], in half the time if the heads come before E. Parameters in float32
    are those of training, and stay where they are.
    """
    is_projection = dtype != "float32" and x.ndim == 4 and x.sharding.spec[1] == FSDP
    return Format(Layout((0, 2, 1, 3)), x.sharding) if is_projection else x.sharding


def fingerprint(params: Params) -> list[int]:
    """Returns a number per parameter that depends on every bit of it, but not on the mesh. Call it under the mesh."""

    @jax.jit
    def numbers(params: Params) -> list[Array]:
        found = []
        for leaf in jax.tree.leaves(params):
            unsigned = {4: jnp.uint32, 2: jnp.uint16}[leaf.dtype.itemsize]
            bits = jax.lax.bitcast_convert_type(leaf, unsigned).astype(jnp.uint32)
            index, stride = jnp.zeros_like(bits), 1
            for dim in reversed(range(leaf.ndim)):
                index += jax.lax.broadcasted_iota(
                    jnp.uint32, leaf.shape, dim, out_sharding=jax.typeof(leaf).sharding
                ) * np.uint32(stride % 2**32)
                stride *= leaf.shape[dim]
            mixed = (bits ^ (index * np.uint32(2654435761))) * np.uint32(2246822519)
            mixed = (mixed ^ (mixed >> 15)) * np.uint32(3266489917)
            found.append(jnp.sum(mixed ^ (mixed >> 13), dtype=jnp.uint32))
        return found

    return [int(number) for number in jax.device_get(numbers(params))]


def replicated(x: np.ndarray, mesh: jax.sharding.Mesh) -> Array:
    """Returns `x` on all devices."""
    return place(x, mesh, P(*(None for _ in x.shape)))


def generation_model(c: config.Model, dtype: str) -> config.Model:
    """Returns the model section in the compute dtype of generation, without what only training needs."""
    return replace(c, dtype=dtype, remat="off", head_groups=1, weights=None)
