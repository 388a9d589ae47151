"""Memory of devices and of compiled programs, in bytes per device."""

import os
from pathlib import Path
from typing import Any, NamedTuple

import jax

from ringattn.hardware import CHIPS


class ProgramMemory(NamedTuple):
    """Memory of a compiled program per device, in bytes.

    `temporaries` is the space that the compiler has set aside for them. It is no measure of the need: its parts may be
    used at different times, and buffers in the vector memory of a TPU count, too. `peak` is the most that is in use at
    one time: arguments, results and live temporaries, without the program. It comes from the compiler's replay of its
    own allocations, by which the TPU compiler refuses a program. That replay also covers the host's memory and gives
    the larger of the two, so that with more bytes on the host than in live temporaries `peak` is `total`, an upper
    bound. So it is on CPUs, whose replay knows no temporaries.
    """

    arguments: int
    temporaries: int
    results: int
    """Without results that reuse memory of donated arguments."""
    host: int
    """Temporaries and arguments in host memory, per device: what is offloaded."""
    peak: int
    program: int
    """The instructions, in the device's memory; 0 on CPUs."""

    @property
    def total(self) -> int:
        """Device memory of arguments, temporaries and results together: an upper bound of `peak`, as a rule."""
        return self.arguments + self.temporaries + self.results


def program_memory(compiled: jax.stages.Compiled) -> ProgramMemory | None:
    """Returns the memory analysis of `compiled`; None if the backend has none (CPU, GPU and TPU have one)."""
    plan = compiled.memory_analysis()
    if plan is None:
        return None
    found = ProgramMemory(
        arguments=plan.argument_size_in_bytes,
        temporaries=plan.temp_size_in_bytes,
        results=plan.output_size_in_bytes - plan.alias_size_in_bytes,
        host=plan.host_temp_size_in_bytes + plan.host_argument_size_in_bytes,
        peak=plan.peak_memory_in_bytes,
        program=plan.generated_code_size_in_bytes,
    )
    devices = {device for each in jax.tree.leaves(compiled.input_shardings) for device in each.device_set}
    is_cpu = {each.platform for each in devices} == {"cpu"}
    return found._replace(peak=found.total if is_cpu else min(found.peak, found.total))


def device_memory(device: Any) -> int | None:
    """Returns the bytes that JAX can allocate on `device`, or the memory of its chip; None if both are unknown."""
    limit = (device.memory_stats() or {}).get("bytes_limit")
    chip = CHIPS.get(device.device_kind)
    return limit if limit is not None or chip is None else int(chip.memory)


def free_memory(device: Any) -> int | None:
    """Returns the free memory of `device`, or of the host for CPU devices, in bytes; None if unknown."""
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    return host_memory(free=True) if device.platform == "cpu" else None


def host_memory(free: bool = False) -> int | None:
    """Returns the memory of this machine, or what is free of it, in bytes; None if unknown.

    Without /proc (macOS), all memory counts as free.
    """
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        return int(lines["MemAvailable" if free else "MemTotal"].split()[0]) * 1024
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError):  # Windows has no sysconf
        return None


def peak_bytes() -> int | None:
    """Returns the maximum over local devices of peak memory in use; None if the backend does not report it."""
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
    return max((peak for peak in peaks if peak is not None), default=None)
