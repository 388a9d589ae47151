"""Changes that reduce the memory of a step: by estimate, and each compiled, with a compiler that needs the estimate."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest
from test_reach import SMALL

from ringattn import config
from ringattn.config.choices import Remat
from ringattn.cost.minimum import saved_bytes
from ringattn.mesh.devices import ring_mesh
from ringattn.planning import changes, resize, trials
from ringattn.planning.changes import Change, changed_steps, order
from ringattn.planning.compile import Target
from ringattn.planning.longest import Need

ROOT = Path(__file__).parents[1]
LLAMA = config.read(ROOT / "configs/llama3_8b_1m.py")
SIZES = {"data": 1, "context_outer": 1, "context": 64, "tensor": 1}


@pytest.fixture
def mesh(monkeypatch):
    """A mesh of 64 devices that count as TPUs."""
    monkeypatch.setattr(changes, "check_divisible", lambda c, mesh: None)
    return SimpleNamespace(shape=SIZES, size=64, devices=np.array([SimpleNamespace(platform="tpu")]))


def options(found) -> list[str]:
    return [each.change.option for each in found]


@pytest.fixture
def found(mesh, unchecked):
    """found(c, refusal): the changed_steps on 64 TPUs."""
    return lambda c, refusal="exceeds hbm": changed_steps(c, mesh, "v5p:4x4x4", refusal)


def test_changes_are_ordered_by_estimated_effect(found):
    c = replace(LLAMA, train=replace(LLAMA.train, batch_size=4), model=replace(LLAMA.model, remat="on"))
    names, savings = options(found(c)), [each.change.saves for each in found(c)]
    assert set(names) == {
        "--model.remat offload",
        "--model.remat offload_inputs",
        "--model.remat offload_groups",
        "--model.head_groups 8",
        "--optimizer.offload True",
        "--train.accumulate 4",
        "--data.seq_len 524288",
        "--topology v5p:4x4x8",
    }
    assert savings == sorted(savings, reverse=True)
    assert min(savings) > 0
    by_name = dict(zip(names, savings, strict=True))
    saved = [
        saved_bytes(replace(c, model=replace(c.model, remat=remat)), SIZES).device or 0 for remat in ("on", "offload")
    ]
    assert by_name["--model.remat offload"] == saved[0] - saved[1]


@pytest.mark.parametrize(
    ("remat", "saving"),
    [
        ("off", {"on", "offload", "offload_inputs", "offload_groups"}),
        ("on", {"offload", "offload_inputs", "offload_groups"}),
        ("offload", {"offload_inputs", "offload_groups"}),
        ("offload_inputs", set()),  # groups of layers save memory of the host alone
        ("offload_groups", set()),
    ],
)
def test_only_the_next_rungs_of_the_ladder_are_changes(found, remat, saving):
    c = replace(LLAMA, model=replace(LLAMA.model, remat=remat))
    assert {option for option in options(found(c)) if "remat" in option} == {f"--model.remat {rung}" for rung in saving}
    assert saving <= set(get_args(Remat))


def test_all_activations_are_estimated_to_take_more_than_those_of_remat_on(found):
    c = replace(LLAMA, model=replace(LLAMA.model, remat="off"))
    (on,) = (each.change for each in found(c) if each.change.option == "--model.remat on")
    assert on.saves > 3 * (saved_bytes(replace(c, model=replace(c.model, remat="on")), SIZES).device or 0)


def test_a_host_that_does_not_suffice_needs_other_changes(found):
    c = replace(LLAMA, model=replace(LLAMA.model, remat="offload"))
    names = options(found(c, "RESOURCE_EXHAUSTED: Used 208.00G of 128.00G host"))
    assert names[0] == "--model.remat offload_groups"
    assert "--model.head_groups 8" not in names, "it saves nothing of the host"


def test_fixed_rings_are_doubled_with_the_devices(found):
    c = replace(LLAMA, mesh=config.Mesh(context=64))
    assert "--topology v5p:4x4x8 --mesh.context 128" in options(found(c))


def test_cpu_devices_share_the_memory_of_the_machine():
    c = replace(SMALL, data=config.Data(seq_len=64))
    names = options(changed_steps(c, ring_mesh(8), "cpu:8", "8 devices need more, but this machine has less"))
    assert not [name for name in names if "topology" in name or "context" in name]


def test_each_change_is_compiled(monkeypatch):
    """Those that fit come first, then those that need least."""
    said, peaks = list[str](), {"on": 80, "offload": 60, "offload_inputs": 90, "offload_groups": 120}
    c = replace(SMALL, model=replace(SMALL.model, remat="off"), train=config.Train(batch_size=2))
    target = Target("cpu:8", ring_mesh(8), 100)

    def measure(changed: config.Config, place: Target) -> Need:
        if changed.train.accumulate == 2:
            return Need("exceeds", None, None)
        peak = 200 if changed.model.remat == "off" else peaks[changed.model.remat]
        return Need(f"{peak} exceeds 100" if peak > 100 else None, peak, 30 if peak == 60 else 0)

    found = trials.try_changes(c, target, "200 exceeds 100", said.append, measure)
    needs = [each.tried for each in found]
    assert [need.peak for need in needs if need is not None] == [60, 80, 90, 120, 200, 200, 200, None]
    assert str(found[0]) == "--model.remat offload: fits, 60 bytes and 30 bytes of the host"
    assert str(found[3]) == "--model.remat offload_groups: does not fit: 120 exceeds 100"
    assert order(found) == "each compiled"
    assert sorted(line.partition("] ")[2] for line in said) == sorted(map(str, found))
    by_estimate = changed_steps(c, target.mesh, "cpu:8", "200 exceeds 100")
    assert [line.partition("] ")[2].partition(": ")[0] for line in said] == options(by_estimate)
    assert str(by_estimate[0].change).startswith("--model.remat offload_inputs: about ")
    assert "--changes True" in order([by_estimate[0].change])


def test_a_larger_topology_is_compiled_for(monkeypatch):
    """As for a TPU; here the devices are those of the CPU."""
    target, places = Target("v5e:2x2", ring_mesh(4), 100), list[Target]()
    larger = Change("--topology v5e:2x4", 10)
    monkeypatch.setattr(trials, "changed_steps", lambda *arguments: [changes.ChangedStep(larger, SMALL, "v5e:2x4")])
    monkeypatch.setattr(resize, "devices_of", lambda topology: list(ring_mesh(8).devices.flat))

    def measure(c: config.Config, place: Target) -> Need:
        places.append(place)
        return Need(None, 50, 0)

    (change,) = trials.try_changes(SMALL, target, "exceeds", lambda line: None, measure)
    assert change == replace(larger, tried=Need(None, 50, 0))
    assert [(place.topology, place.mesh.shape["context"], place.limit) for place in places] == [("v5e:2x4", 8, 100)]
