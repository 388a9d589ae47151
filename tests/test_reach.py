"""The search for the longest rows, with a compiler that takes memory in proportion to the length."""

from dataclasses import replace

import pytest

from ringattn import config
from ringattn.cost.minimum import minimum_memory
from ringattn.mesh.devices import ring_mesh
from ringattn.planning import memory, reach
from ringattn.planning.compile import Target
from ringattn.planning.longest import Need
from ringattn.planning.memory import host_limit

SMALL = config.Config(
    model=config.Model(
        layers=3, dim=64, heads=4, kv_heads=2, head_dim=16, feed_forward=128, vocabulary=300, remat="on"
    ),
    data=config.Data(seq_len=8192),
    train=config.Train(batch_size=1),
)
UNIT = 8 * 1024
PER_UNIT = 3 * 1024 * (64 + 64) * 4
"""Bytes that three layers offload per device for so many tokens: input and attention output, float32."""


def compiler(limit: int, factor: float, offset: int = 0, longest: int = 2**40, lengths: list[int] | None = None):
    """Returns a compiler for which a step takes `offset` + `factor` times the analytic minimum.

    Rows of more than `longest` tokens are refused without a figure. `lengths` collects the lengths compiled.
    """

    def measure(longer: config.Config, target: Target) -> Need:
        length, devices = longer.data.seq_len, target.mesh.size
        if lengths is not None:
            lengths.append(length)
        size = offset + int(factor * minimum_memory(longer, target.mesh.shape).total)
        host = PER_UNIT * length // (1024 * devices) if longer.model.remat == "offload" else 0
        owned = host_limit(target.device)
        if length > longest:
            return Need("exceeds", None, None)
        if size > limit and length > 40 * UNIT:  # an early check of the compiler
            return Need(f"{size} exceeds {limit}", size, None)
        if owned is not None and host > owned:
            return Need(f"{host} exceeds {owned} of the host", size, host)
        return Need(f"{size} exceeds {limit}" if size > limit else None, size, host)

    return measure


@pytest.fixture
def search(monkeypatch):
    """search(c, limit, factor, offset): the result with `compiler`, and the lines reported."""

    def run(
        c: config.Config, limit: int, factor: float, offset: int = 0, host: int | None = None, longest: int = 2**40
    ):
        said: list[str] = []
        monkeypatch.setattr(memory, "HOST_MEMORY", {} if host is None else {"cpu": host})
        target = Target("cpu:8", ring_mesh(8), limit)
        return reach.max_context(c, target, said.append, compiler(limit, factor, offset, longest)), said

    return run


def needs(length: int, factor: float, offset: int) -> int:
    longer = replace(SMALL, data=config.Data(seq_len=length))
    return offset + int(factor * minimum_memory(longer, ring_mesh(8).shape).total)


@pytest.mark.parametrize(("factor", "offset"), [(1.0, 0), (1.7, 0), (3.0, 10_000_000)])
@pytest.mark.parametrize("limit", [60_000_000, 900_000_000])
def test_the_longest_rows_fit_and_a_sixteenth_more_does_not(search, limit, factor, offset):
    found, said = search(SMALL, limit, factor, offset)
    assert found.tokens % UNIT == 0
    assert needs(found.tokens, factor, offset) <= limit
    assert needs(found.tokens + max(UNIT, found.tokens // 16), factor, offset) > limit
    assert found.tried[found.tokens].refusal is None
    assert len(said) == len(found.tried) <= 4, "the memory of two lengths predicts the others"
    assert all("tokens: " in line and line.startswith("[") for line in said)


@pytest.mark.parametrize("last", [77, 150, 151, 199])
def test_without_a_figure_it_bisects(search, last):
    """The compiler refuses rows of more than `last` units, which the memory of shorter rows does not predict."""
    found, said = search(SMALL, 900_000_000, 1.0, longest=last * UNIT)
    assert 0 <= last * UNIT - found.tokens < max(UNIT, found.tokens // 16)
    assert len(said) <= 12


def test_the_hosts_memory_bounds_the_search(search):
    offload = replace(SMALL, model=replace(SMALL.model, remat="offload"))
    found, _ = search(offload, 10**12, 1.0, host=100 * PER_UNIT)
    assert 90 * UNIT <= found.tokens <= 100 * UNIT
    found, said = search(replace(offload, data=config.Data(seq_len=400 * UNIT)), 10**12, 1.0, host=100 * PER_UNIT)
    assert (found.tokens, len(said)) == (100 * UNIT, 1), "longer rows are not compiled"


def test_a_device_that_is_too_small_is_named(search):
    with pytest.raises(ValueError, match="not even rows of 8,192 tokens fit cpu:8; use more devices"):
        search(SMALL, 60_000_000, 3.0, 59_000_000)
