"""The first parameters, layer or gradient that is not finite is found, and the rows of the batch."""

import re
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest

from ringattn import config
from ringattn.data import Loader
from ringattn.runs.progress import Display
from ringattn.runs.verification import named
from ringattn.runs.watchdog import Watchdog
from ringattn.training import diagnosis
from ringattn.training.diagnosis import diagnose, diagnosed
from ringattn.training.recorder import NonFiniteError
from ringattn.training.stage import prepare_stage
from ringattn.training.step import TrainState

UNUSED = 200
"""A token that the data do not contain. The tests put it into row 2 of a batch."""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Config of a model with two kinds of layers, in two microbatches of two rows."""
    directory = tmp_path_factory.mktemp("text")
    for number in range(10):
        text = np.random.default_rng(number).integers(97, 107, 200, dtype=np.uint8)
        (directory / f"{number}.txt").write_bytes(text.tobytes())
    model = config.Model(layers=3, dim=16, heads=4, kv_heads=2, head_dim=8, feed_forward=32, tied=False)
    return config.Config(
        model=replace(model, family="gemma2", window=8, remat="on"),
        data=config.Data(path=str(directory), seq_len=32, validation=0.2),
        train=config.Train(batch_size=4, accumulate=2),
    )


@pytest.fixture(scope="module")
def run(base, make_mesh):
    mesh = make_mesh(data=2, context=2, tensor=2)
    with jax.set_mesh(mesh), pytest.MonkeyPatch.context() as patch:
        original = Loader.batch

        def with_unused_token(self, step):
            batch = original(self, step)
            batch.tokens[2, 5] = UNUSED
            return batch

        patch.setattr(Loader, "batch", with_unused_token)
        yield prepare_stage(base, mesh)


@pytest.fixture(scope="module")
def params(run):
    return run.initial_state().params


def edited(params: Any, *changes: tuple[str, Any, Any]) -> Any:
    """Returns parameters that differ in array[index] = value of each (name of the array, index, value)."""
    leaves, tree = jax.tree.flatten(params)
    for name, index, value in changes:
        position = list(named(params)).index(f"{name}.value")
        array = np.array(leaves[position])
        array[index] = value
        leaves[position] = jax.device_put(array, leaves[position].sharding)
    return jax.tree.unflatten(tree, leaves)


ALL = "in all 4 rows of the batch"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (("layers.attention.key", (1, 3), np.inf), "parameters before this step .*: layer 1's attention.key$"),
        (("norm.scale", 0, np.nan), "parameters before this step contain NaN or infinity: norm.scale$"),
        (("layers.attention.value", 1, 3e38), f"^not finite first: the attention of layer 1, {ALL}$"),
        (("layers.feed_forward.norm.scale", 2, 1e25), f"^not finite first: the output of layer 2, {ALL}$"),
        (
            ("embedding", UNUSED, 3e38),
            r"^not finite first: the embedding, in row 2 \(0 to 3\) of the batch; row 2 begins",
        ),
        (("norm.scale", 0, 0.0), "^the same step, .* is finite: suspect faulty hardware$"),
    ],
)
def test_the_first_part_that_is_not_finite_is_named(run, params, change, expected):
    found = diagnose(run, edited(params, change), 1)
    assert re.search(expected, found), found


def test_the_first_part_of_a_validation_that_is_not_finite_is_named(run, params, tmp_path):
    def found(*change: Any) -> str:
        return diagnosis._diagnose_validation(run, edited(params, change), Watchdog(tmp_path / "hang.txt"))

    assert re.search("^the parameters contain NaN or infinity: norm.scale$", found("norm.scale", 0, np.nan))
    expected = r"^batch 0 of the validation: not finite first: the embedding, in row 2 \(0 to 3\) of the batch"
    assert re.search(expected, found("embedding", UNUSED, 3e38))
    assert re.search("^the same validation, .* is finite: suspect faulty hardware$", found("norm.scale", 0, 0.0))


def test_a_gradient_that_is_not_finite_is_found_from_the_output_and_its_row_by_halves(run, params):
    """The derivative of the gate overflows where dim 0 of x is not 0: in layer 0 only for the unused token."""
    changes = [
        ("embedding", (slice(None), 0), 0.0),
        ("embedding", UNUSED, np.eye(16)[0]),
        ("layers.attention.post_norm.scale", (0, 0), -1.0),
        ("layers.feed_forward.gate", (0, 0), 1e30),
    ]
    found = diagnose(run, edited(params, *changes), 1)
    expected = "the losses are finite; not finite first in the backward pass: the gradient of layer 0's feed_forward"
    assert found.startswith(expected), found
    assert ", even of only row 2 (0 to 3) of the batch; row 2 begins with '" in found


def test_the_message_of_a_step_says_where_it_began_or_that_this_is_unknown(run, params, capsys, monkeypatch, tmp_path):
    def message(**options: bool) -> str:
        state = TrainState(params, None, None)
        with (
            pytest.raises(ValueError, match=r"^loss became nan at step 7; ") as error,
            diagnosed(run, lambda: state, Display(None), Watchdog(tmp_path / "hang.txt")),
        ):
            raise NonFiniteError("loss became nan", 7, "lower it", **options)
        assert type(error.value) is ValueError
        return str(error.value)

    monkeypatch.setattr(diagnosis, "diagnose", lambda run, params, step: f"it began in step {step}")
    assert message() == "loss became nan at step 7; it began in step 7; lower it"
    assert capsys.readouterr().out.startswith("loss became nan at step 7: computing the step again")

    def fail(*_: Any) -> str:
        raise MemoryError("out of memory\nmore")

    monkeypatch.setattr(diagnosis, "diagnose", fail)
    assert message() == "loss became nan at step 7; computing the step again failed (out of memory); lower it"
    monkeypatch.setattr(diagnosis, "_diagnose_validation", lambda run, params, watchdog: "it began there")
    assert message(validation=True) == "loss became nan at step 7; it began there; lower it"
    assert "loss became nan at step 7: computing the validation again" in capsys.readouterr().out
