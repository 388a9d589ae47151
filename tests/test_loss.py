"""Cross entropy in chunks agrees with cross entropy of all logits."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import P

from ringattn.mesh.axes import ACTIVATIONS, FSDP, TENSOR, TOKENS, place
from ringattn.model import loss as loss_module
from ringattn.model.loss import cross_entropy, token_scores

ROWS, DIM, VOCABULARY, PADDED = 2, 16, 70, 128


@pytest.fixture(scope="module")
def arrays():
    """Hidden states, output projection, targets and weights of two rows of 96 tokens."""
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(keys[0], (ROWS, 96, DIM))
    output = jax.random.normal(keys[1], (PADDED, DIM))
    targets = jax.random.randint(keys[2], (ROWS, 96), 0, VOCABULARY)
    weights = jax.random.uniform(keys[3], (ROWS, 96)).at[0, :20].set(0.0)
    return tuple(map(np.asarray, (hidden, output, targets, weights)))


def on_mesh(mesh, arrays):
    specs = (ACTIVATIONS, P(TENSOR, FSDP), TOKENS, TOKENS)
    return [place(array, mesh, spec) for array, spec in zip(arrays, specs, strict=True)]


def plain(hidden, output, targets, weights):
    """Cross entropy of all logits, without the padding of the vocabulary."""
    logits = jnp.einsum("ble,ve->blv", hidden, output[:VOCABULARY], preferred_element_type=jnp.float32)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return jnp.sum(weights * optax.softmax_cross_entropy_with_integer_labels(logits, targets))


def value_and_gradients(function, arrays):
    value, gradients = jax.jit(jax.value_and_grad(function, argnums=(0, 1, 3)))(*arrays)
    return jax.device_get((value, gradients))


@pytest.fixture(scope="module")
def expected(arrays):
    """Value and gradients of `plain`."""
    return value_and_gradients(plain, arrays)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 8, 1), (2, 2, 2), (1, 1, 8)], ids=str)
@pytest.mark.parametrize(("chunk", "rows"), [(512, 32_768), (32, 10), (7, 1)])
def test_loss_and_gradients_agree_with_those_of_all_logits(
    arrays, expected, make_mesh, monkeypatch, sizes, chunk, rows
):
    monkeypatch.setattr(loss_module, "CHUNK", chunk)
    monkeypatch.setattr(loss_module, "MAX_ROWS", rows)
    value, gradients = expected
    mesh = make_mesh(*sizes)
    with jax.set_mesh(mesh):
        ours = partial(cross_entropy, vocabulary=VOCABULARY)
        actual, actual_gradients = value_and_gradients(ours, on_mesh(mesh, arrays))
    np.testing.assert_allclose(actual, value, rtol=2e-6)
    chex.assert_trees_all_close(actual_gradients, gradients, rtol=1e-7, atol=2e-5)
    assert not actual_gradients[1][VOCABULARY:].any()


def test_soft_capped_logits(arrays, make_mesh, monkeypatch):
    monkeypatch.setattr(loss_module, "CHUNK", 32)
    monkeypatch.setattr(loss_module, "MAX_ROWS", 10)
    cap = 1.5  # less than most logits

    def capped(hidden, output, targets, weights):
        logits = cap * jnp.tanh(jnp.einsum("ble,ve->blv", hidden, output[:VOCABULARY]) / cap)
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return jnp.sum(weights * optax.softmax_cross_entropy_with_integer_labels(logits, targets))

    value, gradients = value_and_gradients(capped, arrays)
    with jax.set_mesh(mesh := make_mesh(2, 2, 2)):
        ours = partial(cross_entropy, vocabulary=VOCABULARY, soft_cap=cap)
        actual, actual_gradients = value_and_gradients(ours, on_mesh(mesh, arrays))
    np.testing.assert_allclose(actual, value, rtol=2e-6)
    chex.assert_trees_all_close(actual_gradients, gradients, rtol=1e-7, atol=2e-5)
    assert not actual_gradients[1][VOCABULARY:].any()


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2), (1, 1, 8)], ids=str)
@pytest.mark.parametrize("rows", [32_768, 10, 1])
def test_predictions_are_the_argmax_of_all_logits(arrays, make_mesh, monkeypatch, sizes, rows):
    monkeypatch.setattr(loss_module, "MAX_ROWS", rows)
    hidden, output, targets, _ = map(np.copy, arrays)
    hidden[0, :5] = 0  # all ids are equally likely: the lowest is predicted
    output[VOCABULARY:] = 100 * output[0]  # padding has larger logits
    output[69] = output[13]  # two equally likely ids in different slices
    mesh = make_mesh(*sizes)
    with jax.set_mesh(mesh):
        placed = on_mesh(mesh, (hidden, output, targets, targets))[:3]
        losses, predictions = jax.jit(partial(token_scores, vocabulary=VOCABULARY))(*placed)
    logits = np.einsum("ble,ve->blv", hidden, output[:VOCABULARY])
    np.testing.assert_array_equal(predictions, logits[..., :69].argmax(-1))
    assert 13 in np.asarray(predictions)
    log_probabilities = jax.nn.log_softmax(logits, axis=-1)
    expected = -np.take_along_axis(np.asarray(log_probabilities), targets[..., None], -1)[..., 0]
    np.testing.assert_allclose(losses, expected, atol=2e-5)


def test_large_logits_neither_overflow_nor_underflow(arrays, make_mesh, monkeypatch):
    hidden, output, targets, weights = map(np.copy, arrays)
    mesh = make_mesh(context=2, tensor=2)
    monkeypatch.setattr(loss_module, "MAX_ROWS", 16)  # some slices are all padding
    output[:, 0], hidden[..., 0] = -0.5, 10  # all logits are far below 0
    with jax.set_mesh(mesh):
        scaled = on_mesh(mesh, (hidden * 1000, output, targets, weights))
        value, gradients = value_and_gradients(partial(cross_entropy, vocabulary=VOCABULARY), scaled)
    np.testing.assert_allclose(value, plain(hidden * 1000, output, targets, weights), rtol=1e-5)
    assert all(np.isfinite(gradient).all() for gradient in gradients)


def test_bfloat16_inputs_have_float32_logits(arrays, make_mesh):
    hidden, output, targets, weights = arrays
    narrow = (jnp.bfloat16(hidden), output, targets, weights)
    mesh = make_mesh(context=4)
    with jax.set_mesh(mesh):
        placed = on_mesh(mesh, map(np.asarray, narrow))
        value = cross_entropy(*placed, vocabulary=VOCABULARY)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, plain(narrow[0], jnp.bfloat16(output), targets, weights), rtol=1e-5)


def test_memory_excludes_the_logits_of_a_row(make_mesh):
    mesh = make_mesh()

    def memory(length):
        arrays = (np.zeros((1, length, DIM), np.float32), np.zeros((8192, DIM), np.float32))
        arrays += (np.zeros((1, length), np.int32), np.zeros((1, length), np.float32))
        gradient = jax.jit(jax.grad(partial(cross_entropy, vocabulary=8192), argnums=(0, 1)))
        analysis = gradient.lower(*on_mesh(mesh, arrays)).compile().memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    with jax.set_mesh(mesh):
        assert memory(8192) - memory(4096) < 4096 * 8192  # bytes: a quarter of the added logits
