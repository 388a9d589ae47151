import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ringattn.model.rope import rotate, rotations


def rotated(x, positions, theta=10_000.0):
    return np.asarray(rotate(x, *rotations(jnp.asarray(positions, jnp.int32), x.shape[-1], theta)))


def test_turns_each_pair_by_position_times_frequency():
    x = jax.random.normal(jax.random.key(0), (1, 3, 2, 8))
    positions = np.array([[0, 5, 1000]])
    out = rotated(x, positions)
    pairs = np.asarray(x)[..., :4] + 1j * np.asarray(x)[..., 4:]
    turned = pairs * np.exp(1j * positions[0, :, None, None] * 10_000.0 ** (-np.arange(4) / 4))
    np.testing.assert_allclose(out, np.concatenate([turned.real, turned.imag], -1), atol=2e-4)
    np.testing.assert_array_equal(out[:, 0], x[:, 0])


def test_scores_depend_on_the_distance_alone():
    query, key = jax.random.normal(jax.random.key(1), (2, 1, 1, 1, 64))
    near = np.sum(rotated(query, [[7]]) * rotated(key, [[3]]))
    far = np.sum(rotated(query, [[1007]]) * rotated(key, [[1003]]))
    other = np.sum(rotated(query, [[1007]]) * rotated(key, [[1001]]))
    assert near == pytest.approx(far, abs=1e-3)
    assert near != pytest.approx(other, abs=1e-3)


def test_bfloat16_is_turned_in_float32():
    x = jax.random.normal(jax.random.key(2), (1, 1, 1, 64)).astype(jnp.bfloat16)
    out = rotate(x, *rotations(jnp.full((1, 1), 100_003, jnp.int32), 64, 10_000.0))
    assert out.dtype == jnp.bfloat16
    # Positions in bfloat16 would be off by hundreds.
    wide = rotated(x.astype(jnp.float32), [[100_003]])
    np.testing.assert_allclose(np.asarray(out, np.float32), wide, rtol=2**-8, atol=1e-6)
