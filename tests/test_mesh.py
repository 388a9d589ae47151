"""Device startup, mesh axis sizes, array placement and device order on TPUs."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import FAST_COMPILATION

from ringattn import config
from ringattn.mesh.axes import AXES, TOKENS, place
from ringattn.mesh.devices import FORCED, check_divisible, resolve, start
from ringattn.mesh.topology import closed_walk, ring_boxes

ROOT = Path(__file__).parents[1]
START = """
import jax
from ringattn import config
from ringattn.mesh.devices import start
with config.reported_errors():
    print(dict(start(config.Mesh({})).shape), jax.devices()[0].platform)
"""


def start_in_process(section: str, setup: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs `setup` and then `start` in a new process without the XLA_FLAGS of this one."""
    environ = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    environ |= {"PYTHONPATH": str(ROOT), "XLA_FLAGS": FAST_COMPILATION, **variables}
    command = [sys.executable, "-c", setup + START.format(section)]
    return subprocess.run(command, capture_output=True, text=True, env=environ, timeout=120)


def test_simulated_devices_are_started():
    done = start_in_process("simulate=4, tensor=2")
    assert done.stdout == "{'data': 1, 'context_outer': 1, 'context': 2, 'tensor': 2} cpu\n", done.stderr


def test_xla_flags_take_precedence_over_simulate():
    done = start_in_process("simulate=4", XLA_FLAGS=f"{FORCED}=2")
    assert done.stdout == "{'data': 1, 'context_outer': 1, 'context': 2, 'tensor': 1} cpu\n", done.stderr


def test_running_jax_is_reported_without_traceback():
    done = start_in_process("simulate=4", setup="import jax; jax.devices()", JAX_PLATFORMS="cpu")
    assert done.returncode == 2
    assert done.stderr == (
        "error: mesh.simulate=4, but JAX already runs on 1 devices; "
        "restart Python and call ringattn.mesh.devices.start before other JAX code\n"
    )


def test_a_platform_without_devices_is_one_line():
    """JAX raises an AssertionError without a message."""
    done = start_in_process("", JAX_PLATFORMS="cuda")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: JAX_PLATFORMS=cuda: JAX finds no such device; ")
    assert "pip install -e '.[cuda]'" in line


def test_the_reason_why_jax_finds_no_device_is_kept(monkeypatch):
    def devices():
        raise RuntimeError("Unable to initialize backend 'tpu': it is in use\nTrace:")

    monkeypatch.setattr(jax, "devices", devices)
    with pytest.raises(
        ValueError, match=r"JAX finds no such device \(Unable to .* it is in use\); .* unset JAX_PLATFORMS"
    ):
        start(config.Mesh())


def test_too_many_simulated_devices_are_refused_before_they_start():
    """A million would abort the process or hang it: each takes at least one thread."""
    with pytest.raises(ValueError, match=r"mesh\.simulate=1000000 must be at most 1024"):
        start(config.Mesh(simulate=10**6))


def test_a_coordinator_without_process_ids_is_an_error():
    done = start_in_process("simulate=2", JAX_COORDINATOR_ADDRESS="localhost:1")
    assert done.returncode == 2
    assert "JAX_NUM_PROCESSES is not set; set JAX_COORDINATOR_ADDRESS=HOST:PORT of process 0, JAX_NUM_" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("sizes", "devices", "resolved"),
    [
        ({}, 8, (1, 1, 8, 1)),
        ({"data": -1, "context": 2}, 8, (4, 1, 2, 1)),
        ({"context": 3, "tensor": -1}, 6, (1, 1, 3, 2)),
        ({"data": 2, "context": 2, "tensor": 2}, 8, (2, 1, 2, 2)),
        ({"context_outer": -1, "context": 2}, 8, (1, 4, 2, 1)),
        ({"data": -1, "context": 1}, 1, (1, 1, 1, 1)),
    ],
)
def test_sizes_are_resolved(sizes, devices, resolved):
    assert tuple(resolve(config.Mesh(**sizes), devices).values()) == resolved


@pytest.mark.parametrize(
    ("sizes", "devices", "fix"),
    [
        ({"context": 3}, 8, "--mesh.context 8"),
        ({"context": 3, "data": -1}, 8, "--mesh.context 4"),
        ({"context": 16}, 8, "--mesh.context 8"),
        ({"context": 4, "tensor": 3, "data": 1}, 8, "--mesh.tensor 2"),
        ({"context": 8, "data": 2, "tensor": 2}, 8, "--mesh.context 2"),
        ({"context": 3, "data": 3}, 8, "--mesh.data 2 --mesh.context 4"),
        ({"context": 8}, 1, "--mesh.context 1"),
    ],
)
def test_a_mesh_that_does_not_fit_raises_with_a_fix(monkeypatch, sizes, devices, fix):
    section = config.Mesh(**sizes)
    with pytest.raises(ValueError, match=rf"does not fit {devices} devices?; use {fix}$"):
        resolve(section, devices)
    words = fix.split()
    fixed = {flag.removeprefix("--mesh."): int(size) for flag, size in zip(words[::2], words[1::2], strict=True)}
    resolve(config.Mesh(**sizes | fixed), devices)
    monkeypatch.delenv("XLA_FLAGS")
    simulated = abs(section.data * section.context * section.tensor)
    with pytest.raises(ValueError, match=f"use {fix}, or --mesh.simulate {simulated} for simulated CPU devices$"):
        resolve(section, devices)
    with pytest.raises(ValueError, match=f"use {fix}$"):  # mesh.simulate is set already
        resolve(config.Mesh(**sizes, simulate=devices), devices)


def test_a_mesh_of_more_devices_than_can_be_simulated(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS")
    with pytest.raises(ValueError, match=r"does not fit 8 devices; use --mesh\.context 8$"):
        resolve(config.Mesh(context=10**9), 8)


def test_the_mesh_is_explicit_and_has_all_axes():
    mesh = start(config.Mesh())
    assert mesh.axis_names == ("data", "context_outer", "context", "tensor")
    assert mesh.size == jax.device_count()
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Explicit}


def test_place_gives_each_device_its_shard(make_mesh):
    mesh = make_mesh(data=2, context=4)
    rows = np.arange(32, dtype=np.int32).reshape(2, 16)
    tokens, weights = place((rows, rows.astype(np.float32)), mesh, TOKENS)
    assert weights.dtype == np.float32
    for (row, column), device in np.ndenumerate(mesh.devices[:, 0, :, 0]):
        (shard,) = [shard.data for shard in tokens.addressable_shards if shard.device == device]
        np.testing.assert_array_equal(shard, rows[row : row + 1, 4 * column : 4 * column + 4])


RUN = {
    "model": config.Model(dim=64, heads=4, kv_heads=2, feed_forward=96),
    "data": config.Data(seq_len=64),
    "train": config.Train(batch_size=4, accumulate=2),
}


@pytest.mark.parametrize(
    ("sizes", "changed", "message"),
    [
        (
            {"context": 8},
            {"data": config.Data(seq_len=65)},
            r"data.seq_len=65 .* 2 \* mesh.context = 16 .*use 64 or 80",
        ),
        ({"data": 4}, {}, r"train.batch_size=4 .*mesh.data \* train.accumulate = 8; use 8"),
        (
            {"context": 8},
            {"model": config.Model(dim=60)},
            r"model.dim=60 .*mesh.data \* mesh.context = 8; use 56 or 64",
        ),
        ({"tensor": 3}, {}, r"mesh.tensor=3 must divide 128, .*; use 2"),
        (
            {"context": 4},
            {"attention": config.Attention(strategy="ulysses")},
            r"model.kv_heads=2 .*mesh.tensor \* mesh.context = 4 for attention.strategy='ulysses'; use 4",
        ),
        ({"tensor": 8}, {}, r"model.heads=4 .*mesh.tensor = 8; use 8"),
        ({"tensor": 4}, {}, r"model.kv_heads=2 .*mesh.tensor = 4; use 4"),
        ({"tensor": 2}, {"model": config.Model(feed_forward=97)}, r"model.feed_forward=97 .*= 2; use 96 or 98"),
    ],
)
def test_sizes_that_do_not_divide_over_the_mesh_raise_with_a_fix(make_mesh, sizes, changed, message):
    with pytest.raises(ValueError, match=message):
        check_divisible(config.Config(**RUN | changed), make_mesh(**sizes))


def test_sizes_that_divide_pass(make_mesh):
    check_divisible(config.Config(**RUN), make_mesh(data=2, context=2, tensor=2))


@pytest.mark.parametrize("box", [(2, 2), (2, 4), (8, 8, 1), (3, 4), (4, 3), (4, 4, 4), (3, 3, 2), (1, 2, 5), (1, 2)])
def test_a_closed_walk_is_a_hamiltonian_cycle_over_neighbors(box):
    walk = closed_walk(box)
    assert walk is not None
    assert sorted(walk) == list(range(np.prod(box)))
    cells = np.array(list(np.ndindex(box)))[walk]
    assert (abs(cells - np.roll(cells, 1, axis=0)).sum(1) == 1).all()


@pytest.mark.parametrize("box", [(1, 4), (3, 3), (5,), (3, 3, 3)])
def test_boxes_without_a_closed_walk(box):
    assert closed_walk(box) is None


@pytest.mark.parametrize(
    ("sizes", "box"),
    [
        ((1, 1, 64, 1), (8, 8, 1, 1)),
        ((2, 1, 4, 1), (2, 4, 1, 1)),
        ((2, 1, 32, 1), (4, 4, 4, 1)),
        ((1, 4, 16, 1), (8, 8, 1, 1)),
        ((1, 1, 16, 4), (8, 8, 1, 1)),
        ((2, 1, 4, 2), (4, 4, 1, 1)),
        ((1, 1, 8, 1), (2, 2, 1, 2)),  # two devices per chip
        ((4, 1, 1, 2), (2, 4, 1, 1)),
    ],
)
def test_every_ring_of_a_mesh_is_a_closed_walk(sizes, box):
    coords = list(np.ndindex(box))
    indices = ring_boxes(dict(zip(AXES, sizes, strict=True)), coords)
    assert indices is not None
    assert indices.shape == sizes
    assert sorted(indices.ravel()) == list(range(len(coords)))
    rings = np.array(coords)[np.moveaxis(indices, 2, -1).reshape(-1, sizes[2])]
    assert abs(rings - np.roll(rings, 1, axis=1)).sum(-1).max() <= 1


def test_rings_without_a_cycle_and_devices_that_do_not_fill_a_box():
    assert ring_boxes({"data": 3, "context": 3, "tensor": 1}, list(np.ndindex(3, 3))) is not None
    assert ring_boxes({"data": 1, "context": 3, "tensor": 1}, [(0, 0), (0, 1), (1, 0)]) is None
