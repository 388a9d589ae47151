"""Learning rate schedule, weight decay, gradient clipping, stages."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ringattn import config
from ringattn.training.optimizer import learning_rate, optimizer

SECTION = config.Optimizer(learning_rate=0.01, warmup_steps=10, final_fraction=0.2, weight_decay=0.5, clip_norm=1.0)


@pytest.fixture(autouse=True)
def lax_promotion():
    """Standard dtype promotion, as in the training step, because optax requires it."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def updated(params, gradient, section=SECTION):
    transformation = optimizer(section)
    updates, _ = transformation.update(gradient, transformation.init(params), params)
    return jax.tree.map(np.asarray, updates)


def test_linear_warmup_then_cosine_decay():
    rate = learning_rate(SECTION, 110)
    rates = np.array([np.asarray(rate(step)) for step in range(111)])
    np.testing.assert_allclose(np.diff(rates[:11]), (0.01 - 0.01 / 11) / 10, rtol=1e-3)
    assert rates[0] == pytest.approx(0.01 / 11)
    assert rates[10] == rates.max() == pytest.approx(0.01)
    assert rates[60] == pytest.approx((0.01 + 0.002) / 2)
    assert rates[110] == pytest.approx(0.002)


def test_weight_decay_applies_to_matrices_only():
    params = {"matrix": jnp.ones((2, 2)), "norm": {"scale": jnp.ones((3, 2))}, "key_bias": jnp.ones((3, 2, 2))}
    updates = updated(params, jax.tree.map(jnp.zeros_like, params))
    np.testing.assert_allclose(updates["matrix"], 0.5, rtol=1e-5)
    np.testing.assert_array_equal(updates["norm"]["scale"], 0)  # one per layer
    np.testing.assert_array_equal(updates["key_bias"], 0)


def test_gradients_are_clipped_to_the_global_norm():
    params = {"a": jnp.zeros((2, 2)), "b": jnp.zeros(3)}
    first = {"a": jnp.full((2, 2), 30.0), "b": jnp.full(3, 40.0)}
    transformation = optimizer(SECTION)
    _, state = transformation.update(first, transformation.init(params), params)
    moments = [leaf for leaf in jax.tree.leaves(state) if leaf.shape == (3,)]
    norm = np.sqrt(4 * 30.0**2 + 3 * 40.0**2)
    np.testing.assert_allclose(moments[0], (1 - SECTION.beta1) * 40.0 / norm, rtol=1e-5)


def test_a_run_may_end_during_warmup():
    rate = learning_rate(SECTION, 5)
    rates = np.array([np.asarray(rate(step)) for step in range(5)])
    np.testing.assert_allclose(np.diff(rates), (0.01 - 0.01 / 11) / 10, rtol=1e-3)


def test_each_stage_has_its_own_warmup_and_decay():
    rate, single = learning_rate(SECTION, 110, start_step=50), learning_rate(SECTION, 110)
    for step in (0, 3, 10, 60, 110):
        np.testing.assert_array_equal(np.asarray(rate(jnp.int32(50 + step))), np.asarray(single(jnp.int32(step))))


def test_the_next_stage_keeps_the_moments():
    params, gradient = {"a": jnp.ones((2, 2))}, {"a": jnp.full((2, 2), 0.1)}
    before, after = optimizer(SECTION), optimizer(replace(SECTION, learning_rate=0.02))
    state = before.init(params)
    for _ in range(5):
        _, state = before.update(gradient, state, params)
    updates, state = after.update(gradient, state, params)
    # The bias-corrected moments of a constant gradient g are g and g squared.
    np.testing.assert_allclose(jax.tree.leaves(updates)[0], 1 + SECTION.weight_decay, rtol=1e-4)
    assert [int(leaf) for leaf in jax.tree.leaves(state) if leaf.shape == ()] == [6]
