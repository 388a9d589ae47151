"""Learning rate schedule, weight decay, gradient clipping, stages, skipped updates."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ringattn import config
from ringattn.training.optimizer import (
    MAX_IN_A_ROW,
    MAX_IN_WINDOW,
    MIN_NORMS,
    WINDOW,
    count_skips,
    learning_rate,
    optimizer,
)

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


def test_updates_and_moments_are_those_of_optax():
    params = {"a": jnp.linspace(-1.0, 1.0, 12).reshape(3, 4), "norm": {"scale": jnp.ones(4)}}
    ours, state = optimizer(SECTION), optimizer(SECTION).init(params)
    theirs = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(1.0, SECTION.beta1, SECTION.beta2, weight_decay=0.5, mask={"a": True, "norm": {"scale": False}}),
    )
    expected_state = theirs.init(params)
    for step in range(1, 5):
        gradient = jax.tree.map(lambda x, step=step: jnp.sin(step * x), params)
        updates, state = ours.update(gradient, state, params)
        expected, expected_state = theirs.update(gradient, expected_state, params)
        for one, other in zip(jax.tree.leaves(updates), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(one, -other, rtol=1e-6)


@pytest.mark.parametrize("factor", [None, 3.0])
def test_a_skipped_update_is_zero_and_leaves_the_moments_as_they_are(factor):
    params, gradient = {"a": jnp.ones((2, 2))}, {"a": jnp.full((2, 2), 0.1)}
    transformation = optimizer(replace(SECTION, skip_spikes=factor))
    _, state = transformation.update(gradient, transformation.init(params), params)
    nan = jax.tree.map(lambda x: x * jnp.nan, gradient)
    updates: Any
    after: Any
    updates, after = transformation.update(nan, state, params, skip=jnp.bool_(True))
    np.testing.assert_array_equal(updates["a"], 0)
    before: Any = state
    old, new = (each if factor is None else each.updates for each in (before, after))
    jax.tree.map(np.testing.assert_array_equal, old, new)
    assert count_skips(after) == (None if factor is None else (1, 1, 1))


def skips_of(state):
    skips = count_skips(state)
    assert skips is not None
    return skips


@pytest.fixture
def skipped():
    """skipped(norms): the steps (from 0) that an optimizer with factor 3 skips, and its state."""
    transformation = optimizer(replace(SECTION, skip_spikes=3.0))
    params = {"a": jnp.ones(1)}

    @jax.jit
    def update(state, norm):
        return transformation.update({"a": norm[None]}, state, params, skip=~jnp.isfinite(norm))

    def steps(norms, state=None):
        state, found = state or transformation.init(params), []
        for step, norm in enumerate(norms):
            updates, state = update(state, jnp.float32(norm))
            if skips_of(state).in_a_row:
                found.append(step)
                assert float(updates["a"][0]) == 0
        return found, state

    return steps


def test_a_spike_is_an_update_far_above_the_mean_of_those_that_were_not_skipped(skipped):
    early = [1.0] * (MIN_NORMS - 1)
    assert skipped([*early, 50.0])[0] == []  # too few norms to know
    assert skipped([*early, 1.0, 50.0])[0] == [MIN_NORMS]
    assert skipped([np.nan, *early, 1.0, 3.1])[0] == [0, MIN_NORMS + 1]
    # The mean does not contain spikes, but follows the norms that are no spikes.
    assert skipped([*early, 1.0, 50.0, 50.0, 2.9, 2.9, 3.1])[0] == [MIN_NORMS, MIN_NORMS + 1]
    assert skipped([*[1.0] * WINDOW, *[2.9] * WINDOW, 8.0, 9.0])[0] == [2 * WINDOW + 1]


def test_skipped_updates_are_counted_and_limited(skipped):
    state, norms = skipped([1.0] * MIN_NORMS)[1], []
    for number in range(1, MAX_IN_A_ROW + 1):
        state = skipped([9.0], state)[1]
        skips = skips_of(state)
        assert skips == (number, number, number)
        assert bool(skips.too_many) == (number == MAX_IN_A_ROW)
    state = skipped([1.0] * WINDOW, state)[1]
    assert skips_of(state) == (MAX_IN_A_ROW, 0, 0)
    norms = [9.0, 1.0] * MAX_IN_WINDOW
    before, after = (skips_of(skipped(norms[:count], state)[1]) for count in (len(norms) - 2, len(norms) - 1))
    assert [bool(each.too_many) for each in (before, after)] == [False, True]
    assert after.total == MAX_IN_A_ROW + MAX_IN_WINDOW
