"""The training step: compiles once, donates its state, weights all tokens equally."""

import re
from dataclasses import replace

import chex
import jax
import numpy as np
import pytest

from ringattn import config
from ringattn.config.stages import with_values
from ringattn.data import Batch
from ringattn.mesh.axes import abstract
from ringattn.model.loss import cross_entropy
from ringattn.runs.checkpoint import Checkpoints
from ringattn.runs.verification import named
from ringattn.training import step as step_module
from ringattn.training.stage import prepare_stage
from ringattn.training.step import skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Config of a stage with two microbatches."""
    directory = tmp_path_factory.mktemp("text")
    for number in range(40):
        text = np.random.default_rng(number).integers(97, 107, 60, dtype=np.uint8)
        (directory / f"{number}.txt").write_bytes(text.tobytes())
    return config.Config(
        model=config.Model(layers=1, dim=16, heads=2, kv_heads=1, head_dim=8, feed_forward=32),
        data=config.Data(path=str(directory), seq_len=32, validation=0.2),
        train=config.Train(batch_size=2, accumulate=2),
        optimizer=config.Optimizer(weight_decay=0.0),
    )


@pytest.fixture(scope="module")
def run(base, make_mesh):
    """The stage on two devices."""
    mesh = make_mesh(context=2)
    chex.clear_trace_counter()
    with jax.set_mesh(mesh), pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_module, "cross_entropy", chex.assert_max_traces(step_module.cross_entropy, n=1))
        yield prepare_stage(base, mesh)


def test_compiles_once_and_donates_its_state(run):
    state, losses = run.initial_state(), []
    structure = jax.eval_shape(run.initial_state)
    for index in range(4):
        before = state
        state, metrics = run.train_step(state, run.place(run.training.batch(index)))  # a second trace would raise
        losses.append(float(metrics.loss))
        chex.assert_trees_all_equal_shapes_and_dtypes(state, structure)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before.params))
    assert run.train_step._cache_size() == 1
    assert int(state.step) == 4
    assert losses[-1] < losses[0]


def test_moments_in_host_memory_change_no_bit(base, run, tmp_path, monkeypatch):
    monkeypatch.setattr(step_module, "cross_entropy", cross_entropy)  # `run` allows only one trace
    plain, offloaded = (
        prepare_stage(with_values(base, {"optimizer.offload": offload}), run.mesh) for offload in (False, True)
    )
    states = {}
    for each in (plain, offloaded):
        state = each.initial_state()
        for index in range(3):
            state, _ = each.train_step(state, each.place(each.training.batch(index)))
        kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim}
        assert kinds == {"pinned_host" if each is offloaded else "device"}
        states[each is offloaded] = jax.device_get(state)
        with Checkpoints(tmp_path / str(each is offloaded), keep=1) as checkpoints:
            checkpoints.save(3, state)
            checkpoints.confirm(3)
    chex.assert_trees_all_equal(states[True], states[False])
    for saved, reader in ((True, plain), (False, offloaded), (True, offloaded)):
        with Checkpoints(tmp_path / str(saved), keep=1) as checkpoints:
            state, notes = reader.restore(checkpoints)
        assert notes == []
        chex.assert_trees_all_equal(jax.device_get(state), states[True])
        reader.train_step(state, reader.place(reader.training.batch(3)))  # takes a restored state


def test_a_batch_without_learned_tokens_changes_only_the_step(run):
    state, batch = run.initial_state(), run.training.batch(0)
    state, _ = run.train_step(state, run.place(batch))
    before = jax.device_get(state)
    state = skip(state)
    chex.assert_trees_all_equal(jax.device_get(state), replace(before, step=before.step + np.int32(1)))
    state, metrics = run.train_step(state, run.place(batch))
    assert float(metrics.learning_rate) == pytest.approx(3e-3 * 3 / 21)  # the schedule counts steps, not updates
    assert int(state.step) == 3
    assert run.train_step._cache_size() == 1


@pytest.mark.parametrize("name", ["loss", "gradient"])
def test_numbers_that_are_not_finite_freeze_the_state(run, name):
    """All later steps change nothing, so that the step can be computed again."""
    state, batch = run.initial_state(), run.training.batch(0)
    state, _ = run.train_step(state, run.place(batch))
    before = jax.device_get(state)
    if name == "loss":
        weights = batch.weights.copy()
        weights[0, 0] = np.inf
        state, metrics = run.train_step(state, run.place(batch._replace(weights=weights)))
        assert not np.isfinite(float(metrics.loss))
    else:  # the norm of the gradient overflows, and the loss does not
        names = iter(named(state.params))
        params = jax.tree.map(lambda x: x * 1e30 if next(names).startswith("norm.") else x, state.params)
        before = replace(before, params=jax.device_get(params))
        state, metrics = run.train_step(replace(state, params=params), run.place(batch))
        assert np.isfinite(float(metrics.loss))
        assert not np.isfinite(float(metrics.grad_norm))
    frozen = replace(before, step=~before.step)
    chex.assert_trees_all_equal(jax.device_get(state), frozen)
    state = skip(state)
    for index in (1, 2):
        state, _ = run.train_step(state, run.place(run.training.batch(index)))
        chex.assert_trees_all_equal(jax.device_get(state), frozen)
    assert run.train_step._cache_size() == 1


def test_the_rate_of_a_step_scales_its_update(run):
    """Two states that differ only in their step get the same direction, scaled by the warmup."""
    batch, changes = run.training.batch(0), []
    for step in (0, 3):
        state = run.initial_state()
        before = jax.device_get(state.params)
        state, _ = run.train_step(replace(state, step=state.step + step), run.place(batch))
        changes.append(jax.tree.map(lambda new, old: np.asarray(new) - np.asarray(old), state.params, before))
    for late, early in zip(jax.tree.leaves(changes[1]), jax.tree.leaves(changes[0]), strict=True):
        np.testing.assert_allclose(late, 4 * early, rtol=2e-2, atol=1e-7)


def test_weights_are_relative_to_their_sum_over_all_microbatches(run):
    batch = run.training.batch(0)
    batch = batch._replace(weights=np.array([[1.0], [3.0]], np.float32) * np.ones_like(batch.weights))
    single = [Batch(*(np.stack([x[row]] * 2) for x in batch)) for row in (0, 1)]
    losses = []
    for each in (batch, *single):
        _, metrics = run.train_step(run.initial_state(), run.place(each))
        losses.append(float(metrics.loss))
    assert losses[0] == pytest.approx(0.25 * losses[1] + 0.75 * losses[2], rel=1e-6)
    _, metrics = run.train_step(run.initial_state(), run.place(batch._replace(weights=5 * batch.weights)))
    assert float(metrics.loss) == pytest.approx(losses[0], rel=1e-6)


@pytest.mark.parametrize(
    ("dtype", "strategy", "remat"),
    [
        ("float32", "ring", "on"),
        ("float32", "gather", "off"),
        ("float32", "ulysses", "off"),
        ("bfloat16", "ring", "on"),
    ],
)
def test_float32_products_have_the_highest_precision(base, make_mesh, monkeypatch, dtype, strategy, remat):
    """Training and scoring: by default TPUs round float32 operands to bfloat16, and GPUs to TF32."""
    monkeypatch.setattr(step_module, "cross_entropy", cross_entropy)  # without the limit of `run`
    model = replace(base.model, dtype=dtype, remat=remat, heads=4, kv_heads=2)
    c = replace(base, model=model, attention=replace(base.attention, strategy=strategy))
    mesh = make_mesh(context=2)
    with jax.set_mesh(mesh):
        run = prepare_stage(c, mesh)
        state, batch = abstract(jax.eval_shape(run.initial_state), mesh), run.training.batch(0)
        programs = [
            run.train_step.lower(state, run.place(batch)),
            run.scorer.step.lower(state.params, run.place(batch)),
        ]
    for program, count in zip(programs, (20, 8), strict=True):
        products = re.findall(r"stablehlo.dot_general.*", program.as_text())
        assert len(products) >= count
        highest = [product for product in products if "precision = [HIGHEST, HIGHEST]" in product]
        if dtype == "float32":
            assert highest == products
        else:
            assert not [product for product in highest if "bf16" in product]
