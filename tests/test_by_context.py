from functools import partial

import jax
import numpy as np
import pytest
from flax import nnx

from ringattn import attention, config
from ringattn.mesh import SEQUENCE, TOKENS, place
from ringattn.model import Transformer
from ringattn.training.by_context import context_ranges, losses_by_context, named_losses, sums_by_context
from ringattn.training.run import prepare


@pytest.mark.parametrize(
    ("length", "ranges"),
    [
        (1, [(0, 0)]),
        (64, [(0, 63)]),
        (65, [(0, 63), (64, 64)]),
        (256, [(0, 63), (64, 127), (128, 255)]),
        (300, [(0, 63), (64, 127), (128, 255), (256, 299)]),
    ],
)
def test_ranges_double_and_leave_nothing_out(length, ranges):
    assert context_ranges(length) == ranges


def test_sums_do_not_depend_on_the_order():
    rng = np.random.default_rng(0)
    values = rng.standard_normal((2, 256)).astype(np.float32)
    positions = np.stack([np.arange(256), np.r_[np.arange(100), np.arange(156)]]).astype(np.int32)
    order = rng.permutation(256)
    found = sums_by_context(values[:, order], positions[:, order])
    expected = [values[(positions >= a) & (positions <= b)].sum() for a, b in ((0, 63), (64, 127), (128, 255))]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_a_range_without_weight_has_no_loss():
    named = named_losses(np.array([6.0, 0.0, 1.0]), np.array([3.0, 0.0, 4.0]), 256)
    assert named == {"eval/loss/0-63": 2.0, "eval/loss/128-255": 0.25}
    assert losses_by_context({"step": 1, "eval/loss": 1.0} | named) == {(0, 63): 2.0, (128, 255): 0.25}


@pytest.fixture
def small(tmp_path):
    """A run's config on documents of a hundred bytes or so."""
    rng = np.random.default_rng(0)
    for number in range(40):
        size = int(rng.integers(20, 200))
        (tmp_path / f"{number}.txt").write_bytes(rng.integers(97, 107, size, dtype=np.uint8).tobytes())
    return config.Config(
        model=config.Model(layers=1, dim=16, heads=2, kv_heads=1, head_dim=8, feed_forward=32),
        data=config.Data(path=str(tmp_path), seq_len=192, validation=0.4),
        train=config.Train(batch_size=4, accumulate=2),
        evaluate=config.Evaluate(batches=2),
    )


def test_an_evaluation_on_a_ring_is_that_of_a_plain_model(small, make_mesh):
    with jax.set_mesh(over := make_mesh(data=2, context=4)):
        run = prepare(small, over)
        params = run.initial_state().params
        found = run.evaluate(params)
    whole = jax.tree.map(np.asarray, params)

    losses, places, right = [], [], []
    with jax.set_mesh(make_mesh()):
        graphdef = nnx.graphdef(
            nnx.eval_shape(lambda: Transformer(small.model, 257, partial(attention, axis=SEQUENCE), nnx.Rngs(params=0)))
        )
        shapes = jax.eval_shape(run.initial_state).params
        model = nnx.merge(graphdef, jax.tree.map(lambda x, like: jax.device_put(x, like.sharding.spec), whole, shapes))
        for number in range(2):
            batch = run.held_out.batch(number)
            hidden = model(*place((batch.tokens, batch.positions, batch.segment_ids), make_mesh(), TOKENS))
            logits = np.asarray(hidden, np.float64) @ np.asarray(model.output(), np.float64)[:257].T
            wanted = np.take_along_axis(logits, batch.targets[..., None], -1)[..., 0]
            losses.append(np.log(np.exp(logits).sum(-1)) - wanted)
            places.append(batch.positions)
            right.append(logits.argmax(-1) == batch.targets)
    losses, places = np.concatenate(losses), np.concatenate(places)
    assert found["eval/loss"] == pytest.approx(losses.mean(), rel=1e-5)
    assert found["eval/accuracy"] == pytest.approx(np.mean(right), rel=1e-5)
    by_context = losses_by_context(found)
    assert list(by_context) == [(0, 63), (64, 127), (128, 191)]
    for (first, last), loss in by_context.items():
        assert loss == pytest.approx(losses[(places >= first) & (places <= last)].mean(), rel=1e-5)
