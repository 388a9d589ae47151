"""Rotary position embedding: exact angles, and the frequencies of each scaling method."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ringattn import config
from ringattn.model.rope import frequencies, rotate, rotations

PLAIN = config.Model(head_dim=64)


def rotated(x, positions):
    c = config.Model(head_dim=x.shape[-1])
    return np.asarray(rotate(x, *rotations(jnp.asarray(positions, jnp.int32), c)))


def test_rotates_each_pair_by_position_times_frequency():
    x = jax.random.normal(jax.random.key(0), (1, 3, 2, 8))
    positions = np.array([[0, 5, 1000]])
    out = rotated(x, positions)
    pairs = np.asarray(x)[..., :4] + 1j * np.asarray(x)[..., 4:]
    expected = pairs * np.exp(1j * positions[0, :, None, None] * 10_000.0 ** (-np.arange(4) / 4))
    np.testing.assert_allclose(out, np.concatenate([expected.real, expected.imag], -1), atol=5e-6)
    np.testing.assert_array_equal(out[:, 0], x[:, 0])


@pytest.mark.parametrize("theta", [10_000.0, 500_000.0, 5e7])
def test_angles_are_exact_at_ten_million_tokens(theta):
    c = config.Model(head_dim=128, rope_theta=theta)
    positions = np.array([[1, 4097, 1_048_575, 10_485_759, 2**30 + 12345]])
    angles = positions[..., None, None] * theta ** (-np.arange(64) / 64)  # float64
    cos, sin = rotations(jnp.asarray(positions, jnp.int32), c)
    np.testing.assert_allclose(cos, np.cos(angles), atol=2e-6)
    np.testing.assert_allclose(sin, np.sin(angles), atol=2e-6)


def test_logits_depend_only_on_the_distance():
    query, key = jax.random.normal(jax.random.key(1), (2, 1, 1, 1, 64))
    near = np.sum(rotated(query, [[7]]) * rotated(key, [[3]]))
    far = np.sum(rotated(query, [[10_000_007]]) * rotated(key, [[10_000_003]]))
    other = np.sum(rotated(query, [[1007]]) * rotated(key, [[1001]]))
    assert near == pytest.approx(far, abs=5e-5)
    assert near != pytest.approx(other, abs=1e-3)


def test_bfloat16_is_rotated_in_float32():
    x = jax.random.normal(jax.random.key(2), (1, 1, 1, 64)).astype(jnp.bfloat16)
    out = rotate(x, *rotations(jnp.full((1, 1), 100_003, jnp.int32), PLAIN))
    assert out.dtype == jnp.bfloat16
    # Positions in bfloat16 would be off by hundreds.
    in_float32 = rotated(x.astype(jnp.float32), [[100_003]])
    np.testing.assert_allclose(np.asarray(out, np.float32), in_float32, rtol=2**-8, atol=1e-6)


def scaled(kind, factor, original=8192, theta=500_000.0):
    return config.Model(head_dim=128, rope_theta=theta, rope_scaling=kind, rope_factor=factor, rope_original=original)


def test_scaled_frequencies():
    unscaled = frequencies(config.Model(head_dim=128, rope_theta=500_000.0))
    np.testing.assert_allclose(frequencies(scaled("linear", 8.0)), unscaled / 8)
    ntk = frequencies(scaled("ntk", 8.0))
    # The highest frequency is unscaled, the lowest is divided as in linear scaling.
    np.testing.assert_allclose(ntk[[0, -1]], unscaled[[0, -1]] / [1, 8])
    for kind, turns in (("llama3", (1, 4)), ("yarn", (1, 32))):
        result = frequencies(scaled(kind, 8.0))
        rounds = 8192 * unscaled / (2 * np.pi)
        margin = 2.0 if kind == "yarn" else 1.0  # YaRN rounds the limits outwards to whole pairs
        fast, slow = rounds > turns[1] * margin, rounds < turns[0] / margin
        np.testing.assert_allclose(result[fast], unscaled[fast])
        np.testing.assert_allclose(result[slow], unscaled[slow] / 8)
        between = ~fast & ~slow
        assert between.any()
        assert (result[between] >= unscaled[between] / 8 * 0.999).all()
        assert (result[between] <= unscaled[between] * 1.001).all()
        assert (np.diff(result) < 0).all()


def test_yarn_raises_the_temperature():
    cos, _ = rotations(jnp.zeros((1, 1), jnp.int32), scaled("yarn", 16.0))
    np.testing.assert_allclose(cos, 0.1 * np.log(16) + 1, rtol=1e-6)


GOLDEN = {
    "yarn": [1.0, 0.1579728, 0.02495541, 0.002116075, 7.784655e-05, 1.229764e-05, 1.942693e-06, 3.068926e-07],
    "llama3": [1.0, 0.1579728, 0.02495541, 0.003942276, 7.784655e-05, 1.229764e-05, 1.942693e-06, 3.068926e-07],
}


@pytest.mark.parametrize("kind", GOLDEN)
def test_frequencies_of_published_models(kind):
    """Expected values: modeling_rope_utils.py of Hugging Face transformers 5.23.0, factor 8, training length 8,192."""
    np.testing.assert_allclose(frequencies(scaled(kind, 8.0))[::9], GOLDEN[kind], rtol=2e-6)
