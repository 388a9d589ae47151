"""The sweep over devices, with a compiler that takes memory in proportion to the tokens, and with the real one."""

import itertools
from dataclasses import replace

import pytest
from matplotlib.image import imread
from test_reach import SMALL, compiler

from ringattn import config
from ringattn.cost.minimum import minimum_memory
from ringattn.mesh.devices import ring_mesh
from ringattn.planning import memory
from ringattn.planning.compile import Plan, Target
from ringattn.planning.longest import MaxContext, Need, Reach
from ringattn.planning.memory import DeviceBytes
from ringattn.planning.report import report, write_report
from ringattn.planning.sweep import sweep
from ringattn.planning.topologies import double, smaller


@pytest.mark.parametrize(
    ("topology", "expected"),
    [
        ("v5p:4x4x4", ["v5p:2x4x4", "v5p:2x2x4", "v5p:2x2x2"]),
        ("v5e:8x8", ["v5e:4x8", "v5e:4x4", "v5e:2x4"]),
        ("v5e:2x4", ["v5e:2x2"]),
        ("v5p:2x4x5", ["v5p:2x2x5"]),
        ("h100:8x8", ["h100:4x8", "h100:2x8", "h100:1x8"]),
        ("h100:2x8", ["h100:1x8"]),
        ("h100:8", ["h100:4", "h100:2", "h100:1"]),
        ("cpu:8", ["cpu:4", "cpu:2", "cpu:1"]),
        ("cpu:6", ["cpu:3"]),
        ("v5e:1x1", []),
    ],
)
def test_smaller_topologies(topology, expected):
    assert list(smaller(topology)) == expected


@pytest.mark.parametrize(
    ("topology", "expected"),
    [
        ("v5e:8x8", "v5e:8x16"),
        ("v5e:8x16", "v5e:16x16"),
        ("v5e:16x16", None),
        ("v5p:4x4x4", "v5p:4x4x8"),
        ("h100:8", "h100:2x8"),
        ("h100:2x8", "h100:4x8"),
        ("cpu:8", "cpu:16"),
        ("cpu:1024", None),
    ],
)
def test_a_topology_with_twice_the_devices(topology, expected):
    assert double(topology) == expected


@pytest.mark.parametrize("factor", [1.0, 2.5])
@pytest.mark.parametrize(("host", "remat"), [(None, "on"), (60_000_000, "offload")])
def test_a_sweep_compiles_few_lengths(monkeypatch, factor, host, remat):
    """Growth is linear but for the state, which fewer devices divide among them."""
    monkeypatch.setattr(memory, "HOST_MEMORY", {} if host is None else {"cpu": host})
    limit, lengths = 100_000_000, list[int]()
    measure = compiler(limit, factor, 5_000_000, lengths=lengths)
    c = replace(SMALL, model=replace(SMALL.model, remat=remat))
    found = sweep(c, Target("cpu:8", ring_mesh(8), limit), lambda line: None, measure)
    assert [each.topology for each in found] == ["cpu:1", "cpu:2", "cpu:4", "cpu:8"]
    for each in found:
        mesh, unit = ring_mesh(each.devices), 1024 * each.devices
        assert each.found.tokens % unit == 0
        for length, expected in (
            (each.found.tokens, True),
            (each.found.tokens + each.found.tokens // 16 + unit, False),
        ):
            longer = replace(c, data=config.Data(seq_len=length // unit * unit))
            assert (measure(longer, Target("cpu:8", mesh, limit)).refusal is None) == expected
        assert each.devices == 8 or len(each.found.tried) <= 2, "the largest topology predicts the others"
    state = minimum_memory(c, ring_mesh(1).shape).state
    linear = found[-1].found.tokens / 8
    assert linear * (1 - 1 / 16 - factor * state / limit) < found[0].found.tokens <= linear * (1 + 1 / 16)


def test_what_does_not_fit_is_in_the_table_and_in_the_pictures(tmp_path):
    tried = {8192: Need(None, 2**30, 2**20), 16384: Need("2 GiB", 2**31, None)}
    found = [Reach("cpu:4", 4, MaxContext(0, 4096, {})), Reach("cpu:8", 8, MaxContext(8192, 16384, tried))]
    sizes, device = {"data": 1, "context": 8}, DeviceBytes(2**30, 2**30, 0, 0, 0, 0, 0, 2**30, 0)
    plan = Plan("cpu:8", "cpu", sizes, 10, 8192, True, None, [], device, 0, None, [], None, 1.0)
    plan = replace(plan, sweep=found, max_context=found[1].found)
    lines = list(report(plan))
    (none,) = (line for line in lines if line.strip().startswith("cpu:4"))
    (fits,) = (line for line in lines if line.strip().startswith("cpu:8  "))
    assert none.split() == ["cpu:4", "4", "none", "fit"]
    assert fits.split() == ["cpu:8", "8", "8,192", "1,024", "100", "%", "1", "GiB", "1", "MiB"]
    write_report(plan, tmp_path)
    for name in ("reach", "memory_by_context"):
        assert imread(tmp_path / f"plots/{name}.png").shape[2] == 4
    text = (tmp_path / "report.md").read_text()
    assert "| 16,384 | 2 GiB | ? | 2 GiB |" in text
    assert "| cpu:8 | 8 | 8,192 | 1,024 | 100 % | 1 GiB | 1 MiB |" in text


@pytest.mark.slow
def test_a_sweep_by_the_real_compiler():
    model = replace(SMALL.model, layers=1, dim=16, heads=1, kv_heads=1, head_dim=16, feed_forward=32)
    c, limit, said = replace(SMALL, model=model, data=config.Data(seq_len=65_536)), 30_000_000, list[str]()
    found = sweep(c, Target("cpu:4", ring_mesh(4), limit), said.append)
    assert [each.devices for each in found] == [1, 2, 4]
    assert len(said) == sum(len(each.found.tried) for each in found) <= 9
    lengths = [each.found.tokens for each in found]
    assert all(1.25 < longer / shorter < 2.25 for shorter, longer in itertools.pairwise(lengths))
    for each in found:
        peak = each.found.tried[each.found.tokens].peak
        assert peak is not None
        assert 0.85 * limit < peak <= limit
