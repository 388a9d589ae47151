"""The cache of plans, with a compiler that counts, for devices that count as TPUs."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_reach import SMALL

from ringattn import config
from ringattn.mesh.devices import ring_mesh
from ringattn.planning import cache as cache_module
from ringattn.planning.cache import Cache, user_directory
from ringattn.planning.changes import Change
from ringattn.planning.compile import Plan, Target
from ringattn.planning.longest import MaxContext, Need, Reach
from ringattn.planning.memory import DeviceBytes
from ringattn.planning.report import compiled
from ringattn.planning.schedule import Collective
from ringattn.planning.timing import StepTime

COLLECTIVE = Collective("all-gather", "forward", "bf16[8]", 2**20, 2.5, False, 1e-3, None, 1e-3, 0.1)
PLAN = Plan(
    topology="v5e:2x4",
    device_kind="TPU v5 lite",
    mesh={"data": 1, "context": 8},
    parameters=10,
    tokens=8192,
    fits=True,
    refusal=None,
    changes=[Change("--model.remat on", 5, Need(None, 6, None)), Change("--model.remat offload", 7)],
    device_bytes=DeviceBytes(2**30, 2**31, 1, 2, 3, 4, 5, None, 0),
    host_bytes=0,
    host_limit=None,
    collectives=[COLLECTIVE],
    time=StepTime("cycles", 2.0, 1.9, 1.5, 0.3, 0.02, 0.1, 0.5, 1e9, 100.0, 10.0),
    compile_seconds=65.0,
)


@pytest.fixture
def target(monkeypatch) -> Target:
    """A target whose devices count as TPUs."""
    monkeypatch.setattr(Target, "device", property(lambda self: SimpleNamespace(platform="tpu", device_kind="TPU v5")))
    return Target("v5e:2x4", ring_mesh(8), 2**31)


@pytest.fixture
def compilations(monkeypatch) -> list[str]:
    """The steps compiled."""
    done = list[str]()

    def compile_plan(c, target):
        done.append("plan")
        return PLAN

    def needed(c, target):
        done.append("need")
        return Need(None, 1, 2)

    monkeypatch.setattr(cache_module, "compile_plan", compile_plan)
    monkeypatch.setattr(cache_module, "needed_apart", needed)
    return done


def test_a_plan_is_compiled_once(tmp_path, target, compilations):
    cache = Cache(tmp_path / "new")
    assert cache.plan(SMALL, target) == PLAN
    assert cache.need(SMALL, target) == Need(None, 1, 2)
    again = Cache(tmp_path / "new").plan(SMALL, target)
    assert replace(again, cached=None) == PLAN
    assert compiled(again) == f"compiled in 1 min 5 s, from the cache of {again.cached} (--cache False compiles again)"
    assert compiled(PLAN) == "compiled in 1 min 5 s"
    assert cache.need(SMALL, target) == Need(None, 1, 2)
    assert compilations == ["plan", "need"]
    assert Cache(None).plan(SMALL, target) is PLAN
    assert compilations == ["plan", "need", "plan"]


def test_figures_of_searches_return_from_json():
    tried = {8192: Need(None, 2**30, 0), 16384: Need("2 GiB", None, None)}
    found = MaxContext(8192, 16384, tried)
    full = replace(PLAN, max_context=found, sweep=[Reach("v5e:2x4", 8, found)])
    assert cache_module.restored(Plan, json.loads(json.dumps(asdict(full)))) == full


@pytest.mark.parametrize(
    "change",
    [
        lambda c, target: (replace(c, data=config.Data(seq_len=16_384)), target),
        lambda c, target: (replace(c, model=replace(c.model, layers=4)), target),
        lambda c, target: (replace(c, attention=config.Attention(layout="contiguous")), target),
        lambda c, target: (c, target._replace(topology="v5e:4x2")),
        lambda c, target: (c, target._replace(limit=2**30)),
    ],
)
def test_another_step_is_compiled(tmp_path, target, compilations, change):
    cache = Cache(tmp_path)
    cache.need(SMALL, target)
    cache.need(*change(SMALL, target))
    assert len(compilations) == 2
    cache.need(replace(SMALL, name="other", log=config.Log(every=7)), target)
    assert len(compilations) == 2, "the name does not change the step"


@pytest.mark.parametrize(
    ("name", "value"),
    [("_version", lambda package: "9"), ("_sources", lambda: "changed"), ("FLAGS", ("HOME",))],
)
def test_other_versions_flags_and_sources_compile_again(tmp_path, target, compilations, monkeypatch, name, value):
    cache = Cache(tmp_path)
    cache.need(SMALL, target)
    monkeypatch.setattr(cache_module, name, value)
    cache.need(SMALL, target)
    assert len(compilations) == 2


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[:-20],
        lambda text: text.replace('"parameters": 10', '"parameters": 11'),
        lambda text: "[1, 2]",
        lambda text: "{}",
    ],
)
def test_a_damaged_entry_is_compiled_again(tmp_path, target, compilations, damage):
    cache = Cache(tmp_path)
    cache.plan(SMALL, target)
    (path,) = tmp_path.iterdir()
    path.write_text(damage(path.read_text()))
    assert cache.plan(SMALL, target) == PLAN
    assert compilations == ["plan", "plan"]
    assert cache.plan(SMALL, target).cached is not None, "and is replaced"


def test_an_unwritable_directory_compiles_every_time(tmp_path, target, compilations):
    (tmp_path / "file").touch()
    for _ in range(2):
        assert Cache(tmp_path / "file").plan(SMALL, target) == PLAN
    assert compilations == ["plan", "plan"]


def test_steps_for_cpus_are_not_kept(tmp_path, compilations):
    """Their limit is the memory of this machine."""
    cache, target = Cache(tmp_path), Target("cpu:8", ring_mesh(8), 2**31)
    for _ in range(2):
        cache.plan(SMALL, target)
    assert compilations == ["plan", "plan"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("platform", "variable", "expected"),
    [
        ("linux", None, "/home/ada/.cache/ringattn/plans"),
        ("linux", "/cache", "/cache/ringattn/plans"),
        ("darwin", None, "/home/ada/Library/Caches/ringattn/plans"),
        ("win32", None, "/home/ada/AppData/Local/ringattn/plans"),
    ],
)
def test_the_directory_follows_the_platform(monkeypatch, platform, variable, expected):
    monkeypatch.setattr(cache_module.sys, "platform", platform)
    monkeypatch.setattr(Path, "home", lambda: Path("/home/ada"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if variable is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", variable)
    assert user_directory() == Path(expected)
