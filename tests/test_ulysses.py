"""The exchange of heads: its transfers, and rejected arguments."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from wire import transfers

from ringattn import attention
from ringattn.attn.reference import reference_attention

ULYSSES = {"strategy": "ulysses"}


def arrays(mesh: jax.sharding.Mesh, heads: int, groups: int, length: int = 64) -> list[jax.Array]:
    rng = np.random.default_rng(0)
    sharding = jax.NamedSharding(mesh, jax.P(None, "context"))
    shapes = [(1, length, count, 8) for count in (heads, groups, groups)]
    return [jax.device_put(rng.standard_normal(shape).astype(np.float32), sharding) for shape in shapes]


def test_heads_that_do_not_split_are_refused_with_a_fix(make_mesh):
    with jax.set_mesh(mesh := make_mesh(context=8)):
        inputs = arrays(mesh, 9, 3)
        message = (
            "cannot split 3 K/V heads over 8 devices of axis 'context'; use strategy='ring'.* whose size divides 3"
        )
        with pytest.raises(ValueError, match=message):
            attention(*inputs, **ULYSSES)
        assert attention(*inputs, strategy="ring").shape == (1, 64, 9, 8)


def test_every_array_is_exchanged_once(make_mesh):
    with jax.set_mesh(mesh := make_mesh(context=4)):
        sent = transfers(lambda *x: attention(*x, **ULYSSES), *arrays(mesh, 8, 4))
    assert {transfer.dtype for transfer in sent} == {"float32"}  # positions are implied
    assert sorted(transfer.shape for transfer in sent) == sorted(
        [(1, 16, 8, 8), (1, 16, 4, 8), (1, 16, 4, 8), (1, 64, 2, 8)]
    )
    assert {transfer.primitive for transfer in sent} == {"all_to_all"}


def test_every_head_keeps_its_sink_and_slope(make_mesh):
    sinks = jnp.asarray(np.linspace(-3, 3, 8), jnp.float32)
    slopes = jnp.asarray(2.0 ** -np.arange(1, 9), jnp.float32)
    with jax.set_mesh(mesh := make_mesh(context=4)):
        inputs = arrays(mesh, 8, 4)
        out = attention(*inputs, sinks=sinks, slopes=slopes, **ULYSSES)
    expected = reference_attention(*(jnp.asarray(jax.device_get(x)) for x in inputs), sinks=sinks, slopes=slopes)
    np.testing.assert_allclose(out, expected, atol=1e-5)
