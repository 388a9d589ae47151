"""Memory of compiled programs and of devices."""

from types import SimpleNamespace

import jax

from ringattn.cost.memory import device_memory, free_memory, peak_bytes, program_memory
from ringattn.hardware import CHIPS


def device(kind="TPU v5 lite", platform="tpu", **stats):
    return SimpleNamespace(device_kind=kind, platform=platform, memory_stats=lambda: stats or None)


def test_the_plan_excludes_results_that_reuse_donated_arguments():
    x = jax.ShapeDtypeStruct((512, 512), "float32")
    size = 512 * 512 * 4
    separate, donated = (
        program_memory(jax.jit(lambda x: x + x, donate_argnums=numbers).lower(x).compile()) for numbers in ((), (0,))
    )
    assert separate is not None
    assert donated is not None
    assert (separate.arguments, separate.results) == (size, size)
    assert (donated.arguments, donated.results) == (size, 0)
    assert separate.total == separate.arguments + separate.temporaries + separate.results
    assert separate.host == donated.host == 0


def test_memory_of_devices():
    reported = device(bytes_limit=1000, bytes_in_use=300, peak_bytes_in_use=700)
    assert (device_memory(reported), free_memory(reported)) == (1000, 700)
    assert device_memory(device()) == CHIPS["TPU v5 lite"].memory
    assert device_memory(device(kind="unknown")) is None
    assert free_memory(device()) is None
    free = free_memory(device(kind="cpu", platform="cpu"))
    assert free is None or 2**20 < free < 2**50


def test_peak_of_the_local_devices(monkeypatch):
    assert peak_bytes() is None  # CPU devices do not report it
    devices = [device(peak_bytes_in_use=500), device(peak_bytes_in_use=700), device()]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    assert peak_bytes() == 700
