"""For a given seed, the loss of every step is the same on every mesh and with any number of microbatches."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from ringattn import config
from ringattn.mesh.devices import ring_mesh
from ringattn.training.stage import prepare_stage

STEPS = 10
MODEL = config.Model(layers=2, dim=32, heads=4, kv_heads=2, head_dim=8, feed_forward=64)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A directory of short documents, so that a row holds several."""
    directory = tmp_path_factory.mktemp("text")
    words = ["ring", "keys", "values", "round", "device", "queries", "shard", "hop", "segment", "row"]
    rng = np.random.default_rng(0)
    for number in range(60):
        (directory / f"{number}.txt").write_text(" ".join(rng.choice(words, rng.integers(5, 60))))
    return directory


def losses(text, mesh, strategy: Any = "ring", accumulate=1, **model) -> np.ndarray:
    """Loss and gradient norm of each step of a run on `mesh`."""
    c = config.Config(
        model=replace(MODEL, **model),
        data=config.Data(path=str(text), seq_len=64, validation=0.2),
        attention=config.Attention(strategy=strategy),
        optimizer=config.Optimizer(learning_rate=1e-2, warmup_steps=2),
        train=config.Train(steps=STEPS, batch_size=8, accumulate=accumulate),
    )
    with jax.set_mesh(mesh):
        run = prepare_stage(c, mesh)
        state, rows = run.initial_state(), []
        for step in range(STEPS):
            batch = run.training.batch(step)
            # Uneven weights, with which a mean of the microbatches' means would not be the mean.
            batch = batch._replace(weights=np.float32(0.1) + batch.targets % np.float32(7) * (batch.targets > 110))
            state, metrics = run.train_step(state, run.place(batch))
            rows.append([float(metrics.loss), float(metrics.grad_norm)])
    train_step: Any = run.train_step
    assert train_step._cache_size() == 1  # it compiled once
    return np.array(rows)


@pytest.fixture(scope="module")
def one_device(text):
    result = losses(text, ring_mesh(1))
    assert result[-1, 0] < 0.8 * result[0, 0]  # the model learns, so that a wrong gradient changes later losses
    return result


SLOW_SIZES = [pytest.param(sizes, marks=pytest.mark.slow) for sizes in ((1, 2), (2, 4), (1, 4, 2))]


@pytest.mark.parametrize("sizes", [(8, 1), (1, 8), (2, 2, 2), (1, 4, 1, 2), *SLOW_SIZES], ids=str)
def test_every_step_is_the_same_on_every_mesh(text, one_device, make_mesh, sizes):
    np.testing.assert_allclose(losses(text, make_mesh(*sizes)), one_device, rtol=1e-4)


@pytest.mark.parametrize(
    ("strategy", "sizes"),
    [
        ("gather", (1, 2, 1, 2)),
        ("ulysses", (2, 2)),
        ("usp", (1, 2, 1, 2)),
        ("usp", (2, 2)),
        pytest.param("auto", (1, 2, 1, 2), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_every_step_is_the_same_with_every_strategy(text, one_device, make_mesh, strategy, sizes):
    np.testing.assert_allclose(losses(text, make_mesh(*sizes), strategy), one_device, rtol=1e-4)


@pytest.mark.parametrize("remat", ["off", "on"])
def test_every_step_is_the_same_with_microbatches(text, one_device, make_mesh, remat):
    np.testing.assert_allclose(losses(text, make_mesh(1, 2), remat=remat, accumulate=4), one_device, rtol=1e-4)


def test_losses_in_bfloat16_follow_those_in_float32(text, one_device, make_mesh):
    narrow = losses(text, make_mesh(2, 2, 2), remat="on", dtype="bfloat16")
    np.testing.assert_allclose(narrow[:, 0], one_device[:, 0], rtol=2e-2)


def step_ratio(runs, capsys, rounds=8) -> float:
    """Runs the steps of two runs {name: (mesh, config)} in turn. Returns the ratio of their median times."""
    prepared, seconds = {}, {name: [] for name in runs}
    for name, (mesh, c) in runs.items():
        with jax.set_mesh(mesh):
            run = prepare_stage(c, mesh)
            prepared[name] = run, run.initial_state()
    for step in range(rounds):
        for name, (mesh, _) in runs.items():
            run, state = prepared[name]
            with jax.set_mesh(mesh):
                batch = run.place(run.training.batch(step))
                began = time.perf_counter()
                state, _ = jax.block_until_ready(run.train_step(state, batch))
                seconds[name].append(time.perf_counter() - began)
            prepared[name] = run, state
    medians = {name: float(np.median(taken[2:])) for name, taken in seconds.items()}  # without compilation
    one, other = medians.values()
    with capsys.disabled():
        print(
            "",
            *(f"{name}: {taken:.3f} s per step" for name, taken in medians.items()),
            f"ratio {one / other:.2f}",
            sep="\n",
        )
    return one / other


QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.py"


@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
def test_a_ring_of_simulated_devices_costs_at_most_twice_one_device(make_mesh, capsys):
    """The quickstart's step on its 8 devices and on one: `pytest -m slow -s -k costs` prints both times."""
    c = config.read(QUICKSTART)
    assert step_ratio({"8 devices": (make_mesh(context=8), c), "1 device": (make_mesh(), c)}, capsys) <= 2


@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
def test_rematerialization_costs_at_most_a_third(make_mesh, capsys):
    """The quickstart's step with model.remat on and off."""
    c, mesh = config.read(QUICKSTART), make_mesh(context=8)
    runs = {f"remat {remat}": (mesh, replace(c, model=replace(c.model, remat=remat))) for remat in ("on", "off")}
    assert step_ratio(runs, capsys) <= 1.35
