"""flax_attention inside flax.nnx.MultiHeadAttention agrees with Flax's own attention."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType

import ringattn
from ringattn import Mask

B, L, E = 2, 32, 16


@pytest.fixture
def mesh():
    return jax.make_mesh((8,), ("context",), axis_types=(AxisType.Auto,))


def layer(attention_fn=nnx.dot_product_attention, **options) -> nnx.MultiHeadAttention:
    options = {"decode": False, "rngs": nnx.Rngs(0), **options}
    return nnx.MultiHeadAttention(num_heads=4, in_features=E, attention_fn=attention_fn, **options)


def output_and_gradient(module: nnx.MultiHeadAttention, x: jax.Array, **options):
    graphdef, params = nnx.split(module)

    @jax.jit
    def run(params, x):
        return jax.value_and_grad(lambda p: (nnx.merge(graphdef, p)(x, **options) ** 2).sum())(params)

    return run(params, x)


@pytest.mark.parametrize("causal", [False, True])
def test_it_agrees_with_flax(mesh, causal):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((B, L, E)), jnp.float32)
    expected = output_and_gradient(layer(), x, is_causal=causal)
    with jax.set_mesh(mesh):
        sharded = jax.device_put(x, jax.NamedSharding(mesh, jax.P(None, "context")))
        bidirectional = partial(ringattn.flax_attention, masking=Mask(causal=False))
        actual = output_and_gradient(layer(bidirectional), sharded, is_causal=causal)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), expected, actual)


def test_masking_and_options_are_bound_by_partial(mesh):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((B, L, E)), jnp.float32)
    i, j = np.arange(L)[:, None], np.arange(L)[None, :]
    banded = jnp.asarray((j <= i) & (j >= i - 3))[None, None]
    expected = output_and_gradient(layer(), x, mask=banded)
    window = partial(ringattn.flax_attention, masking=Mask(window=(3, 0)), strategy="gather")
    with jax.set_mesh(mesh):
        actual = output_and_gradient(layer(window), x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), expected, actual)


def test_arrays_of_all_pairs_and_dropout_are_refused(mesh):
    x = jnp.ones((B, L, E), jnp.float32)
    with jax.set_mesh(mesh):
        attention_fn = partial(ringattn.flax_attention, masking=Mask())
        module = layer(attention_fn)
        with pytest.raises(ValueError, match=r"mask.shape=\(1, 1, 32, 32\) must not have an entry per pair"):
            module(x, mask=jnp.ones((1, 1, L, L), bool))
        with pytest.raises(ValueError, match="sow_weights=True"):
            module(x, sow_weights=True)
        with pytest.raises(ValueError, match=r"dropout_rate=0.5 .* use dropout_rate=0.0"):
            layer(attention_fn, dropout_rate=0.5, deterministic=False, keep_rngs=True)(x, rngs=nnx.Rngs(1))


@pytest.mark.parametrize("bound", [{}, {"mask": Mask(window=3)}, {"is_causal": True}])
def test_an_attention_fn_without_masking_is_refused(mesh, bound):
    """Flax passes its own mask and is_causal over bound ones, so all of these are the same call."""
    x = jnp.ones((B, L, E), jnp.float32)
    message = r"masking=None must be .*masking=Mask\(causal=True\)\), or causal=False, .* Flax passes its own"
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=message):
        layer(partial(ringattn.flax_attention, **bound))(x)
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=message):
        output_and_gradient(layer(partial(ringattn.flax_attention, **bound)), x, is_causal=True)


def test_a_wrong_masking_and_a_mask_object_are_refused(mesh, unchecked):
    x = jnp.ones((B, L, 4, 4), jnp.float32)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"mask": "causal"}, r"mask='causal' must be None, .* bind masking=ringattn\.Mask"),
        ({"mask": Mask()}, r"mask=Mask\(.*\) must be None, .* bind masking=ringattn\.Mask"),
        ({"masking": "causal"}, r"masking='causal' must be a ringattn\.Mask"),
    ]
    for arguments, message in wrong:
        with jax.set_mesh(mesh), pytest.raises(ValueError, match=message):
            ringattn.flax_attention(x, x, x, **arguments)


def test_is_causal_with_fewer_queries_than_keys_is_refused(mesh):
    """Flax aligns the first query with the first key, ringattn the last with the last."""
    x = jnp.ones((B, L, E), jnp.float32)
    with jax.set_mesh(mesh), pytest.raises(ValueError, match="needs as many queries as keys, not 16 and 32; use mask"):
        layer(partial(ringattn.flax_attention, masking=Mask(causal=False)))(x[:, :16], x, is_causal=True)


def test_parameters_of_a_layer_may_be_sinks_and_slopes(mesh, unchecked):
    x, parameter = jnp.ones((B, L, 4, 4), jnp.float32), nnx.Param(jnp.zeros(4))
    with jax.set_mesh(mesh):
        out = jax.eval_shape(lambda p: ringattn.attention(x, x, x, sinks=p, slopes=p), parameter)
    assert out.shape == x.shape
