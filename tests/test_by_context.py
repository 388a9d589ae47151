"""Loss by number of preceding tokens, and validation."""

import jax
import numpy as np
import pytest
from flax import nnx

from ringattn import config
from ringattn.data.placement import permute_and_place
from ringattn.mesh.axes import abstract
from ringattn.model.build import model_factory
from ringattn.training.by_context import context_ranges, losses_by_context, named_losses, sums_by_context
from ringattn.training.stage import prepare_stage


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
def test_ranges_double_and_cover_the_length(length, ranges):
    assert context_ranges(length) == ranges


def test_sums_do_not_depend_on_the_order_of_tokens():
    rng = np.random.default_rng(0)
    values = rng.standard_normal((2, 256)).astype(np.float32)
    positions = np.stack([np.arange(256), np.r_[np.arange(100), np.arange(156)]]).astype(np.int32)
    order = rng.permutation(256)
    sums = sums_by_context(values[:, order], positions[:, order])
    expected = [values[(positions >= a) & (positions <= b)].sum() for a, b in ((0, 63), (64, 127), (128, 255))]
    np.testing.assert_allclose(sums, expected, rtol=1e-5, atol=1e-5)


def test_a_range_without_weight_has_no_loss():
    named = named_losses(np.array([6.0, 0.0, 1.0]), np.array([3.0, 0.0, 4.0]), 256)
    assert named == {"eval/loss/0-63": 2.0, "eval/loss/128-255": 0.25}
    assert losses_by_context({"step": 1, "eval/loss": 1.0} | named) == {(0, 63): 2.0, (128, 255): 0.25}


@pytest.fixture
def small(tmp_path):
    """Config of a run on documents of 20 to 200 bytes."""
    rng = np.random.default_rng(0)
    for number in range(40):
        size = int(rng.integers(20, 200))
        (tmp_path / f"{number}.txt").write_bytes(rng.integers(97, 107, size, dtype=np.uint8).tobytes())
    return config.Config(
        model=config.Model(layers=1, dim=16, heads=2, kv_heads=1, head_dim=8, feed_forward=32),
        data=config.Data(path=str(tmp_path), seq_len=192, validation=0.4),
        train=config.Train(batch_size=4, accumulate=2),
        validation=config.Validation(batches=2),
    )


def test_validation_on_a_ring_agrees_with_the_logits_on_one_device(small, make_mesh):
    with jax.set_mesh(mesh := make_mesh(data=2, context=4)):
        run = prepare_stage(small, mesh)
        params = run.initial_state().params
        advanced: list[int] = []
        values = run.validate(params, advanced.append)
        assert advanced == [1] * run.validation_batches
        assert run.validate(params) == values
        assert run.scorer.step._cache_size() == 1  # compiled once

    losses, positions, correct, text_bytes = [], [], [], 0
    with jax.set_mesh(mesh := make_mesh()):
        graphdef = nnx.graphdef(nnx.eval_shape(model_factory(small, 257)))
        like = abstract(jax.eval_shape(run.initial_state).params, mesh)
        params = jax.tree.map(lambda x, leaf: jax.device_put(np.asarray(x), leaf.sharding), params, like)
        run_model = jax.jit(lambda params, *ids: nnx.merge(graphdef, params).logits(*ids))
        for index in range(2):
            batch = run.held_out.batch(index)
            assert batch.segment_ids is not None
            ids = (batch.tokens, batch.positions, batch.segment_ids)
            logits = np.asarray(run_model(params, *permute_and_place(ids, mesh, "contiguous")), np.float64)
            target_logits = np.take_along_axis(logits, batch.targets[..., None], -1)[..., 0]
            losses.append(np.log(np.exp(logits).sum(-1)) - target_logits)
            positions.append(batch.positions)
            correct.append(logits.argmax(-1) == batch.targets)
            text_bytes += np.count_nonzero(batch.targets < 256)
    losses, positions = np.concatenate(losses), np.concatenate(positions)
    assert values["eval/loss"] == pytest.approx(losses.mean(), rel=1e-5)
    assert values["eval/accuracy"] == pytest.approx(np.mean(correct), rel=1e-5)
    assert values["eval/bits_per_byte"] == pytest.approx(losses.sum() / np.log(2) / text_bytes, rel=1e-5)
    by_context = losses_by_context(values | {"eval/loss/x": 1.0, "eval/loss/1": 1.0})
    assert list(by_context) == [(0, 63), (64, 127), (128, 191)]
    for (first, last), loss in by_context.items():
        assert loss == pytest.approx(losses[(positions >= first) & (positions <= last)].mean(), rel=1e-5)
