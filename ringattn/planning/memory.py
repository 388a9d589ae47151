"""Memory of a compiled step: what it holds at its peak, and what to change if it does not fit.

The figures come from `compiled.memory_analysis()`; `cost.memory` says what each of them means.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from ringattn import config
from ringattn.cost.memory import ProgramMemory, host_memory
from ringattn.cost.program import Program
from ringattn.cost.roofline import arrays
from ringattn.hardware import CHIPS, HOST_MEMORY
from ringattn.mesh.axes import sequence_shards
from ringattn.mesh.gpu_flags import MEMORY_FRACTION
from ringattn.units import bytes_in_words

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40, "P": 2**50}
_SIZE = r"([\d.]+)([KMGTP]?)"


@dataclass(frozen=True)
class DeviceBytes:
    """Memory of one device. The parts add up to the peak."""

    peak: int | None
    """The most that is in use at one time; None if the compiler refused the step without a figure."""
    limit: int | None
    """Limit of a program's memory: the compiler's on TPUs, 90 % of the memory on GPUs, a share of this machine's for a
    CPU device; None if unknown."""
    parameters: int
    """This device's shards of the parameters, float32."""
    optimizer: int
    """This device's shards of the optimizer state, float32; 0 if its moments are in the host's memory."""
    batch: int
    gradients: int
    """This device's shards of the gradient, float32."""
    saved: int
    """Activations that all layers save for the backward pass, on the device."""
    temporaries: int | None
    """All else: what a layer, the loss or a gathered parameter needs while it is computed; None if unknown."""
    program: int | None
    """The instructions; None if unknown."""

    @property
    def parts(self) -> dict[str, int]:
        """The known parts by name, in the order of a report."""
        found = {
            "parameters": self.parameters,
            "optimizer state": self.optimizer,
            "batch": self.batch,
            "gradients": self.gradients,
            "saved activations": self.saved,
            "temporaries": self.temporaries,
            "program": self.program,
        }
        return {name: size for name, size in found.items() if size is not None}


def compiled_saved_bytes(program: Program, c: config.Config, sizes: Mapping[str, int]) -> int:
    """Returns the bytes that layers save on the device, of a program: arrays [layers, ...] of tokens of a forward loop.

    0 if layers of several kinds share no loop.
    """
    layers, tokens, found = c.model.layers, c.data.seq_len // sequence_shards(sizes), [0]
    for ops in program.computations.values():
        for op in ops:
            if op.kind == "while" and "jvp(" in op.rest and "transpose(" not in op.rest:
                stacks = [array for array in arrays(op.shape) if array.dims[:1] == (layers,) and tokens in array.dims]
                found.append(sum(array.bytes for array in stacks))
    return max(found)


def device_bytes(
    memory: ProgramMemory | None, limit: int | None, known: Mapping[str, int], saved: int, refused: int | None
) -> DeviceBytes:
    """Returns the memory of a step.

    Args:
      memory: None if the compiler refused the step.
      known: parameters, optimizer, batch and gradients.
      saved: bytes of activations that the layers save on the device.
      refused: the bytes in the compiler's error; None without one.
    """
    if memory is None:
        return DeviceBytes(refused, limit, **known, saved=saved, temporaries=None, program=None)
    rest = memory.peak - sum(known.values()) - saved
    peak = memory.peak + memory.program
    return DeviceBytes(peak, limit, **known, saved=saved, temporaries=rest, program=memory.program)


def device_limit(devices: Sequence[Any]) -> int | None:
    """Returns the bytes that a program may use on each of the devices; None if unknown."""
    device = devices[0]
    if device.platform == "cpu":
        memory = host_memory()
        return None if memory is None else memory // len(devices)
    chip = CHIPS.get(device.device_kind)
    if chip is None or device.platform != "tpu":
        return None if chip is None else int(MEMORY_FRACTION * chip.memory)
    return _compiler_limit(devices) or int(chip.memory)


def _compiler_limit(devices: Sequence[Any]) -> int | None:
    """Returns the limit of the TPU compiler, which reserves a part of the memory, from its error for a huge array."""
    sharding = jax.NamedSharding(jax.sharding.Mesh(list(devices), ("device",)), jax.P())
    huge = jax.ShapeDtypeStruct((2**44,), jnp.uint8, sharding=sharding)
    try:
        jax.jit(jnp.negative).lower(huge).compile()
    except jax.errors.JaxRuntimeError as error:
        found = re.search(rf"available HBM \({_SIZE}\)", str(error))
        return None if found is None else _bytes(found[1], found[2])
    return None


def host_limit(device: Any) -> int | None:
    """Returns the host's memory per device in bytes; None if unknown, or if the host's memory is the device's."""
    memory = HOST_MEMORY.get(device.device_kind)
    return None if memory is None else int(memory)


def reason_against(device: Any, count: int, needed: DeviceBytes, host: int, owned: int | None) -> str | None:
    """Returns why a step that the compiler accepted does not fit `count` devices; None if it fits.

    `host` and `owned` are the bytes in the host's memory, and those of the host, per device.
    """
    peak, limit = needed.peak, needed.limit
    if peak is not None and limit is not None and peak > limit:
        if device.platform == "cpu":
            all_peaks, memory = (bytes_in_words(count * size) for size in (peak, limit))
            return f"{count} devices need {all_peaks}, but this machine has {memory}"
        return f"a device needs {bytes_in_words(peak)}, but has {bytes_in_words(limit)}"
    if owned is not None and host > owned:
        return f"a device needs {bytes_in_words(host)} of its host, which has {bytes_in_words(owned)} per device"
    return None


def refused_bytes(error: str) -> tuple[str, int | None]:
    """Returns the reason and the bytes that were required, from a compiler's error."""
    reason = next((line.strip() for line in error.splitlines() if "xceed" in line), error[:500])
    found = re.search(rf"\({_SIZE}\) exceeds|Used {_SIZE} of", error)
    if found is None or "host" in reason.lower():
        return reason, None
    return reason, _bytes(*(found.groups()[:2] if found[1] else found.groups()[2:]))


def _bytes(number: str, unit: str) -> int:
    return int(float(number) * _UNITS[unit])
