import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from ringattn import config, mesh

ROOT = Path(__file__).parents[1]
START = """
import jax
from ringattn import config, mesh
with config.reported_errors():
    print(dict(mesh.start(config.Mesh({})).shape), jax.devices()[0].platform)
"""


def start(section: str, before: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
    """`mesh.start` in a process of its own, with nothing of this one's XLA_FLAGS."""
    environ = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    environ |= {"PYTHONPATH": str(ROOT), **variables}
    command = [sys.executable, "-c", before + START.format(section)]
    return subprocess.run(command, capture_output=True, text=True, env=environ, timeout=120)


def test_simulated_devices_are_started():
    done = start("simulate=4, tensor=2")
    assert done.stdout == "{'data': 1, 'context_outer': 1, 'context': 2, 'tensor': 2} cpu\n", done.stderr


def test_devices_forced_by_the_user_win():
    done = start("simulate=4", XLA_FLAGS=f"{mesh.FORCED}=2")
    assert done.stdout == "{'data': 1, 'context_outer': 1, 'context': 2, 'tensor': 1} cpu\n", done.stderr


def test_a_jax_that_already_runs_is_reported_without_traceback():
    done = start("simulate=4", before="import jax; jax.devices()", JAX_PLATFORMS="cpu")
    assert done.returncode == 2
    assert done.stderr == (
        "error: mesh.simulate=4, but JAX already runs on 1 devices: start the mesh before anything else uses JAX\n"
    )


def test_a_coordinator_without_numbers_is_refused():
    done = start("simulate=2", JAX_COORDINATOR_ADDRESS="localhost:1")
    assert done.returncode == 2
    assert "set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID" in done.stderr
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
    assert tuple(mesh.resolve(config.Mesh(**sizes), devices).values()) == resolved


@pytest.mark.parametrize(
    ("sizes", "devices", "cure"),
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
def test_a_mesh_that_does_not_fit_is_refused_with_one_that_does(monkeypatch, sizes, devices, cure):
    section = config.Mesh(**sizes)
    with pytest.raises(ValueError, match=rf"does not fit {devices} devices?: use {cure}$"):
        mesh.resolve(section, devices)
    words = cure.split()
    cured = sizes | {
        flag.removeprefix("--mesh."): int(size) for flag, size in zip(words[::2], words[1::2], strict=True)
    }
    mesh.resolve(config.Mesh(**cured), devices)
    monkeypatch.delenv("XLA_FLAGS")
    simulated = abs(section.data * section.context * section.tensor)
    with pytest.raises(ValueError, match=f"use {cure}, or --mesh.simulate {simulated} for simulated CPU devices$"):
        mesh.resolve(section, devices)
    with pytest.raises(ValueError, match=f"use {cure}$"):  # the number of simulated devices was chosen
        mesh.resolve(config.Mesh(**sizes, simulate=devices), devices)


def test_the_mesh_is_explicit_and_has_every_axis():
    ring = mesh.start(config.Mesh())
    assert ring.axis_names == ("data", "context_outer", "context", "tensor")
    assert ring.size == jax.device_count()
    assert set(ring.axis_types) == {jax.sharding.AxisType.Explicit}


def test_place_gives_each_device_its_piece(make_mesh):
    ring = make_mesh(data=2, context=4)
    rows = np.arange(32, dtype=np.int32).reshape(2, 16)
    tokens, weights = mesh.place((rows, rows.astype(np.float32)), ring, mesh.TOKENS)
    assert weights.dtype == np.float32
    for (row, column), device in np.ndenumerate(ring.devices[:, 0, :, 0]):
        (piece,) = [shard.data for shard in tokens.addressable_shards if shard.device == device]
        np.testing.assert_array_equal(piece, rows[row : row + 1, 4 * column : 4 * column + 4])


RUN = {
    "model": config.Model(dim=64, heads=4, kv_heads=2, feed_forward=96),
    "data": config.Data(seq_len=64),
    "train": config.Train(batch_size=4, accumulate=2),
}


@pytest.mark.parametrize(
    ("sizes", "changed", "message"),
    [
        ({"context": 8}, {"data": config.Data(seq_len=65)}, r"data.seq_len=65 .* 16 .*use 64 or 80"),
        ({"data": 4}, {}, r"train.batch_size=4 .*mesh.data \* train.accumulate = 8: use 8"),
        (
            {"context": 8},
            {"model": config.Model(dim=60)},
            r"model.dim=60 .*mesh.data \* mesh.context = 8: use 56 or 64",
        ),
        ({"tensor": 8}, {}, r"model.heads=4 .*mesh.tensor = 8: use 8"),
        ({"tensor": 4}, {}, r"model.kv_heads=2 .*mesh.tensor = 4: use 4"),
        ({"tensor": 2}, {"model": config.Model(feed_forward=97)}, r"model.feed_forward=97 .*= 2: use 96 or 98"),
    ],
)
def test_what_does_not_divide_over_the_mesh_is_refused_with_a_cure(make_mesh, sizes, changed, message):
    with pytest.raises(ValueError, match=message):
        mesh.check(config.Config(**RUN | changed), make_mesh(**sizes))


def test_what_divides_passes(make_mesh):
    mesh.check(config.Config(**RUN), make_mesh(data=2, context=2, tensor=2))


@pytest.mark.parametrize("box", [(2, 2), (2, 4), (8, 8, 1), (3, 4), (4, 3), (4, 4, 4), (3, 3, 2), (1, 2, 5), (1, 2)])
def test_a_closed_walk_goes_from_neighbour_to_neighbour_and_back(box):
    walk = mesh.closed_walk(box)
    assert walk is not None
    assert sorted(walk) == list(range(np.prod(box)))
    walked = np.array(list(np.ndindex(box)))[walk]
    assert (abs(walked - np.roll(walked, 1, axis=0)).sum(1) == 1).all()


@pytest.mark.parametrize("box", [(1, 4), (3, 3), (5,), (3, 3, 3)])
def test_where_there_is_no_closed_walk_there_is_none(box):
    assert mesh.closed_walk(box) is None


@pytest.mark.parametrize(
    ("sizes", "box"),
    [
        ((1, 1, 64, 1), (8, 8, 1, 1)),
        ((2, 1, 4, 1), (2, 4, 1, 1)),
        ((2, 1, 32, 1), (4, 4, 4, 1)),
        ((1, 4, 16, 1), (8, 8, 1, 1)),
        ((1, 1, 16, 4), (8, 8, 1, 1)),
        ((2, 1, 4, 2), (4, 4, 1, 1)),
        ((1, 1, 8, 1), (2, 2, 1, 2)),  # two devices a chip
        ((4, 1, 1, 2), (2, 4, 1, 1)),
    ],
)
def test_every_ring_of_a_mesh_is_a_closed_walk(sizes, box):
    places = list(np.ndindex(box))
    found = mesh.ring_boxes(dict(zip(mesh.AXES, sizes, strict=True)), places)
    assert found is not None
    assert found.shape == sizes
    assert sorted(found.ravel()) == list(range(len(places)))
    rings = np.array(places)[np.moveaxis(found, 2, -1).reshape(-1, sizes[2])]
    assert abs(rings - np.roll(rings, 1, axis=1)).sum(-1).max() <= 1


def test_a_ring_that_cannot_close_is_a_row_and_half_a_box_is_taken_as_it_comes():
    assert mesh.ring_boxes({"data": 3, "context": 3, "tensor": 1}, list(np.ndindex(3, 3))) is not None
    assert mesh.ring_boxes({"data": 1, "context": 3, "tensor": 1}, [(0, 0), (0, 1), (1, 0)]) is None
