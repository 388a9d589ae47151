"""A train step's minimum memory, and the refusal of what cannot fit. test_planning compares it with compiled steps."""

import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ringattn import config
from ringattn.config.stages import with_values
from ringattn.cost import minimum
from ringattn.cost.minimum import check_free_memory, check_minimum, minimum_memory, saved_bytes
from ringattn.mesh.axes import CONTEXT, CONTEXT_OUTER, DATA, TENSOR

SIZES = {DATA: 2, CONTEXT_OUTER: 1, CONTEXT: 4, TENSOR: 1}
BASE = config.Config(
    model=config.Model(layers=3, dim=64, heads=4, kv_heads=2, head_dim=16, feed_forward=128, vocabulary=300),
    data=config.Data(seq_len=512),
    train=config.Train(batch_size=4),
)
LLAMA_405B = config.Model(
    layers=126, dim=16384, heads=128, kv_heads=8, head_dim=128, feed_forward=53248, vocabulary=128_256, dtype="bfloat16"
)


def test_the_parts():
    weights = 3 * (64 * 16 * (4 + 2 + 2 + 4) + 3 * 64 * 128) + 300 * 64
    tokens = 4 * 512 // 8
    state, gradient, activations, batch = needed = minimum_memory(BASE, SIZES)
    assert (state, gradient) == (12 * weights // 8, 4 * weights // 8)
    assert (activations, batch) == (3 * tokens * (64 + 4 * 16) * 4, 20 * tokens)
    assert needed.total == state + batch + activations
    accumulated = minimum_memory(with_values(BASE, {"train.accumulate": 2}), SIZES)
    assert (accumulated.activations, accumulated.batch) == (activations // 2, batch)
    offloaded = minimum_memory(with_values(BASE, {"model.remat": "offload"}), SIZES)
    assert offloaded.activations == activations // 3
    moments = minimum_memory(with_values(BASE, {"optimizer.offload": True}), SIZES)
    assert (moments.state, moments.gradient) == (state // 3, gradient + 2 * state // 3)
    tensor = minimum_memory(BASE, SIZES | {DATA: 1, TENSOR: 2})
    assert (tensor.state, tensor.batch, tensor.activations) == (state, 2 * batch, 2 * activations * 3 // 4)


@pytest.mark.parametrize(
    ("values", "device", "host"),
    [
        ({"model.remat": "off"}, None, 0),
        ({"model.remat": "on"}, (3, 3, 3), 0),
        ({"model.remat": "offload"}, (0, 0, 3), (3, 3, 0)),
        ({"model.remat": "offload_inputs"}, (0, 0, 0), (3, 0, 0)),
        ({"model.remat": "offload_groups"}, (0, 0, 3), (1 + 3, 3, 0)),
        ({"model.remat": "offload_groups", "model.layers": 8}, (0, 0, 4), (2 + 4, 4, 0)),
        ({"model.remat": "offload_groups", "model.layers": 5}, (0, 0, 1), (5 + 1, 1, 0)),
        (
            {"model.remat": "offload_groups", "model.layers": 8, "model.window": 5}
            | {"model.pattern": ("window", "window", "full")},
            (0, 0, 3 + 2),
            (2 + 3 + 2, 3 + 2, 0),
        ),
        (
            {"model.remat": "offload_groups", "model.layers": 5, "model.window": 5}
            | {"model.pattern": ("window", "window", "full")},
            (0, 0, 5),
            (5, 5, 0),
        ),
    ],
    ids=str,
)
def test_what_layers_save(values, device, host):
    """Numbers of inputs, outputs of attention and log-sum-exps."""

    def size(numbers):
        inputs, outputs, lses = numbers
        return 4 * (4 * 512 // 8) * (inputs * 64 + outputs * 4 * 16 + lses * 4)

    saved = saved_bytes(with_values(BASE, values), SIZES)
    assert saved == (device if device is None else size(device), size(host) if host else 0)


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"model.layers": 10**9}, "model.layers"),
        ({"model.dim": 2 * 10**9}, "model.dim"),
        ({"model.heads": 10**9}, "model.heads"),
        ({"model.heads": 10**9, "model.kv_heads": 10**9}, "model.heads"),
        ({"model.head_dim": 10**9}, "model.head_dim"),
        ({"model.feed_forward": 2 * 10**9}, "model.feed_forward"),
        ({"model.vocabulary": 10**12}, "model.vocabulary"),
        ({"data.seq_len": 8 * 10**14}, "data.seq_len"),
        ({"train.batch_size": 10**12}, "train.batch_size"),
        ({"train.batch_size": 10**12, "train.accumulate": 10**12}, "train.batch_size"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_absurd_sizes_are_refused_by_name(make_mesh, values, field):
    with pytest.raises(ValueError, match=rf"^each of 8 cpu devices needs at least .* \(state .*; reduce {field}=\d+$"):
        check_free_memory(with_values(BASE, values), make_mesh(data=2, context=4))


def test_the_limit_and_its_message(make_mesh, monkeypatch):
    mesh, needed = make_mesh(data=2, context=4), minimum_memory(BASE, SIZES)
    check_minimum(BASE, mesh, None)
    check_minimum(BASE, mesh, needed.total)
    parts = "state 190.1 KiB, gradient 63.38 KiB, activations 384 KiB, batch 5 KiB"
    message = (
        f"each of 8 cpu devices needs at least 579.1 KiB for a train step ({parts}), "
        "but its share of this machine's memory is 579.1 KiB; reduce model.dim=64"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check_minimum(BASE, mesh, needed.total - 1)
    check_minimum(BASE, mesh, needed.total // 10 + 1, factor=10)
    with pytest.raises(ValueError, match="but its share"):
        check_minimum(BASE, mesh, needed.total // 10 - 1, factor=10)
    monkeypatch.setattr(minimum, "free_memory", lambda device: 8 * needed.total)
    check_free_memory(BASE, mesh)
    monkeypatch.setattr(minimum, "free_memory", lambda device: 8 * needed.total - 8)  # all devices share the memory
    with pytest.raises(ValueError, match="free memory is"):
        check_free_memory(BASE, mesh)


def test_a_stage_is_named_by_its_option(make_mesh):
    staged = config.Config(model=BASE.model, stages=(config.Stage(), config.Stage(seq_len=8 * 10**14)))
    with (
        config.stage_errors(staged.stages, 2),
        pytest.raises(ValueError, match=r"reduce stages\.2\.seq_len=800000000000000$"),
    ):
        check_free_memory(staged.stage(2), make_mesh(context=8))


def test_a_large_model_needs_a_large_machine():
    """12 bytes per parameter: 405 billion take 4.7 TB, and a million tokens of activations 4 TB."""
    c = config.Config(model=LLAMA_405B, data=config.Data(seq_len=2**20), train=config.Train(batch_size=1))
    for devices, fits in ((256, False), (1024, True)):
        needed = minimum_memory(c, {DATA: 1, CONTEXT_OUTER: 1, CONTEXT: devices, TENSOR: 1})
        assert needed.state == pytest.approx(12 * 403.75e9 / devices, rel=1e-3)
        assert (needed.total < 16 * 2**30) == fits


@pytest.mark.usefixtures("unchecked")
def test_more_devices_are_suggested_for_accelerators():
    device = SimpleNamespace(device_kind="TPU v5 lite", platform="tpu")
    mesh: Any = SimpleNamespace(shape=SIZES, size=8, devices=np.array([device] * 8))
    needed = minimum_memory(BASE, SIZES).total
    with pytest.raises(ValueError, match=r"but has 56\.47 KiB of memory; reduce .*, or use at least 83 devices$"):
        check_minimum(BASE, mesh, 57_829)
    assert 82 < 8 * needed / 57_829 <= 83
