"""One seed gives one run: the loss of every step is the same on every mesh, and in however many parts."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from ringattn import config
from ringattn.mesh import ring
from ringattn.training.run import prepare

STEPS = 20
MODEL = config.Model(layers=2, dim=32, heads=4, kv_heads=2, head_dim=8, feed_forward=64)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A folder of short documents, so that a row holds several."""
    folder = tmp_path_factory.mktemp("text")
    words = ["ring", "keys", "values", "round", "device", "queries", "shard", "hop", "segment", "row"]
    rng = np.random.default_rng(0)
    for number in range(60):
        (folder / f"{number}.txt").write_text(" ".join(rng.choice(words, rng.integers(5, 60))))
    return folder


def losses(text, mesh, strategy: Any = "ring", accumulate=1, **model) -> np.ndarray:
    """Loss and gradient norm of each step, of a run on `mesh`."""
    c = config.Config(
        model=replace(MODEL, **model),
        data=config.Data(path=str(text), seq_len=64, validation=0.2),
        attention=config.Attention(strategy=strategy),
        optimizer=config.Optimizer(warmup_steps=4),
        train=config.Train(steps=STEPS, batch_size=8, accumulate=accumulate),
    )
    with jax.set_mesh(mesh):
        run = prepare(c, mesh)
        state, rows = run.initial_state(), []
        for step in range(STEPS):
            batch = run.rows.batch(step)
            # Uneven, so that a mean of parts' means would not be the mean.
            batch = batch._replace(weights=np.float32(0.1) + batch.targets % np.float32(7) * (batch.targets > 110))
            state, metrics = run.train_step(state, run.on_devices(batch))
            rows.append([float(metrics.loss), float(metrics.grad_norm)])
    return np.array(rows)


@pytest.fixture(scope="module")
def alone(text):
    return losses(text, ring(1))


@pytest.mark.parametrize("sizes", [(8, 1), (1, 2), (1, 4), (1, 8), (2, 4), (1, 4, 2), (2, 2, 2), (1, 4, 1, 2)], ids=str)
def test_every_step_is_the_same_on_every_mesh(text, alone, make_mesh, sizes):
    assert alone[-1, 0] < 0.8 * alone[0, 0]  # it learns, so that a wrong gradient would show
    np.testing.assert_allclose(losses(text, make_mesh(*sizes)), alone, rtol=1e-4)


@pytest.mark.parametrize(
    ("strategy", "sizes"),
    [("gather", (1, 2, 1, 2)), ("ulysses", (2, 2)), ("usp", (1, 2, 1, 2)), ("usp", (2, 2)), ("auto", (1, 2, 1, 2))],
    ids=str,
)
def test_and_by_every_strategy(text, alone, make_mesh, strategy, sizes):
    np.testing.assert_allclose(losses(text, make_mesh(*sizes), strategy), alone, rtol=1e-4)


@pytest.mark.parametrize("remat", ["off", "on"])
def test_every_step_is_the_same_in_any_number_of_parts(text, alone, make_mesh, remat):
    np.testing.assert_allclose(losses(text, make_mesh(1, 2), remat=remat, accumulate=4), alone, rtol=1e-4)


def test_bfloat16_learns_as_float32_does(text, alone, make_mesh):
    narrow = losses(text, make_mesh(2, 2, 2), remat="on", dtype="bfloat16")
    np.testing.assert_allclose(narrow[:, 0], alone[:, 0], rtol=2e-2)


def step_ratio(runs, capsys, rounds=12) -> float:
    """Median seconds of a step of the first of two runs {name: (mesh, config)} over those of the second, in turn."""
    prepared, seconds = {}, {name: [] for name in runs}
    for name, (mesh, c) in runs.items():
        with jax.set_mesh(mesh):
            run = prepare(c, mesh)
            prepared[name] = run, run.initial_state()
    for step in range(rounds):
        for name, (mesh, _) in runs.items():
            run, state = prepared[name]
            with jax.set_mesh(mesh):
                batch = run.on_devices(run.rows.batch(step))
                began = time.perf_counter()
                state, _ = jax.block_until_ready(run.train_step(state, batch))
                seconds[name].append(time.perf_counter() - began)
            prepared[name] = run, state
    medians = {name: float(np.median(taken[2:])) for name, taken in seconds.items()}  # the first two compile
    one, other = medians.values()
    with capsys.disabled():
        print(
            "",
            *(f"{name}: {taken:.3f} s a step" for name, taken in medians.items()),
            f"ratio {one / other:.2f}",
            sep="\n",
        )
    return one / other


QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.py"


@pytest.mark.slow
def test_a_ring_of_simulated_devices_costs_little_over_one(make_mesh, capsys):
    """The quickstart's step on its 8 devices and on one: `pytest -m slow -s -k costs_little` shows both."""
    c = config.read(QUICKSTART)
    assert step_ratio({"8 devices": (make_mesh(context=8), c), "1 device": (make_mesh(), c)}, capsys) <= 2


@pytest.mark.slow
def test_computing_layers_again_costs_little(make_mesh, capsys):
    """The quickstart's step with model.remat on and off."""
    c, mesh = config.read(QUICKSTART), make_mesh(context=8)
    runs = {f"remat {remat}": (mesh, replace(c, model=replace(c.model, remat=remat))) for remat in ("on", "off")}
    assert step_ratio(runs, capsys) <= 1.35
