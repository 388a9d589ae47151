"""Steps compiled at once, in other processes."""

import threading
from dataclasses import replace

import pytest
from test_reach import SMALL

from ringattn import config
from ringattn.mesh.devices import ring_mesh
from ringattn.planning import parallel
from ringattn.planning.compile import Target, needed
from ringattn.planning.longest import Need
from ringattn.planning.parallel import compile_all, needed_apart, simultaneous


@pytest.mark.parametrize(
    ("cores", "free", "expected"),
    [(1, 2**40, 1), (2, 2**40, 1), (3, 2**40, 1), (8, 2**40, 4), (64, 12 * 2**30, 2), (64, 2**30, 1), (64, None, 1)],
)
def test_cores_and_memory_bound_the_number(monkeypatch, cores, free, expected):
    monkeypatch.setattr(parallel.os, "cpu_count", lambda: cores)
    monkeypatch.setattr(parallel, "host_memory", lambda free: memory)
    memory = free
    assert simultaneous() == expected


def test_results_keep_the_order_of_the_jobs(monkeypatch):
    """Each of two jobs waits for the other, so that they must run at once."""
    monkeypatch.setattr(parallel, "simultaneous", lambda: 2)
    both = threading.Barrier(2, timeout=60)
    assert compile_all(lambda job: (both.wait(), job)[1], [1, 2, 3, 4]) == [1, 2, 3, 4]
    monkeypatch.setattr(parallel, "simultaneous", lambda: 1)
    threads = compile_all(lambda job: threading.current_thread(), [1, 2])
    assert threads == [threading.main_thread()] * 2


def test_one_at_a_time_compiles_in_this_process(monkeypatch):
    monkeypatch.setattr(parallel, "simultaneous", lambda: 1)
    monkeypatch.setattr(parallel, "needed", lambda c, target: Need("here", 1, 2))
    assert needed_apart(SMALL, Target("cpu:8", ring_mesh(8), None)) == Need("here", 1, 2)


@pytest.mark.slow
def test_another_process_needs_the_same(monkeypatch):
    monkeypatch.setattr(parallel, "simultaneous", lambda: 2)
    c = replace(SMALL, model=replace(SMALL.model, layers=1), data=config.Data(seq_len=256))
    target = Target("cpu:2", ring_mesh(2), 1000)
    assert needed_apart(c, target) == needed(c, target)
    with pytest.raises(ValueError, match=r"compiling for v5e:3x3 in another process failed: .*must be even"):
        needed_apart(c, target._replace(topology="v5e:3x3"))
