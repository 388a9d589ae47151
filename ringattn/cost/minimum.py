"""The memory that a train step needs at least, computed from the config before anything is traced or allocated."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ringattn import config
from ringattn.config import option
from ringattn.config.stages import with_values
from ringattn.cost.flops import product_weights
from ringattn.cost.memory import free_memory
from ringattn.mesh.axes import TENSOR
from ringattn.model.families import layer_kinds, layer_pattern
from ringattn.model.pattern import group_size
from ringattn.units import bytes_in_words

SMALLEST: dict[str, dict[str, Any]] = {
    "data.seq_len": {"data": config.Data(seq_len=1)},
    "train.batch_size": {"train": config.Train(batch_size=1)},
    "model.layers": {"model.layers": 1},
    "model.dim": {"model.dim": 1},
    "model.heads": {"model.heads": 1, "model.kv_heads": 1},
    "model.head_dim": {"model.head_dim": 2},
    "model.feed_forward": {"model.feed_forward": 1},
    "model.vocabulary": {"model.vocabulary": 1},
}
"""Values that reduce each field as far as possible."""


class Saved(NamedTuple):
    """Bytes per device of what the forward pass saves for the backward pass."""

    device: int | None
    """In the device's memory; None for remat "off", where it depends on the compiler."""
    host: int


def saved_bytes(c: config.Config, sizes: Mapping[str, int]) -> Saved:
    """Returns what the layers save, per `model.remat`, on a mesh with axes of `sizes`.

    These are the input of each layer, the output of attention, and its log-sum-exp in float32. With remat
    "offload_groups", the inputs of all groups, and these for the layers of one group.
    """
    model, rest = c.model, 0
    heads, itemsize = model.heads // sizes[TENSOR], jnp.dtype(model.dtype).itemsize
    tokens = c.train.batch_size // c.train.accumulate * c.data.seq_len * sizes[TENSOR] // math.prod(sizes.values())
    layer_input, lse = tokens * model.dim * itemsize, tokens * heads * 4
    both = layer_input + tokens * heads * model.head_dim * itemsize
    if model.remat == "off":
        return Saved(None, 0)
    if model.remat == "on":
        return Saved(model.layers * (both + lse), 0)
    if model.remat == "offload":
        return Saved(model.layers * lse, model.layers * both)
    if model.remat == "offload_inputs":
        return Saved(0, model.layers * layer_input)
    pattern = len(layer_pattern(model)) if len(layer_kinds(model)) > 1 else 1
    size = group_size(model.layers, pattern)
    groups, rest = divmod(model.layers, size)
    if pattern > 1 and groups < 2:  # no group, see `scan_layers`
        return Saved(model.layers * lse, model.layers * both)
    return Saved((size + rest) * lse, groups * layer_input + (size + rest) * both)


def host_bytes(c: config.Config, sizes: Mapping[str, int]) -> int:
    """Returns a lower bound of the host's memory per device: saved activations, and moments that stay on the host."""
    return saved_bytes(c, sizes).host + host_moments(c, math.prod(sizes.values()))


def host_moments(c: config.Config, devices: int) -> int:
    """Returns the bytes of AdamW's moments per device that stay in the host's memory."""
    return 2 * 4 * product_weights(c.model, c.model.vocabulary or 0) // devices if c.optimizer.offload else 0


class MinimumMemory(NamedTuple):
    """Lower bounds in bytes per device. A compiled train step needs at least `total`."""

    state: int
    """Matrix weights and their two AdamW moments, float32; without the moments if they are in the host's memory."""
    gradient: int
    """Gradient of the matrix weights, float32; with the moments if these are on the device for the update only."""
    activations: int
    """Saved on the device for the backward pass: of each layer at least its input and the output of attention."""
    batch: int
    """Four arrays of int32 and one of float32."""

    @property
    def total(self) -> int:
        """The whole gradient and all activations exist at different times."""
        return self.state + self.batch + max(self.gradient, self.activations)


def minimum_memory(c: config.Config, sizes: Mapping[str, int]) -> MinimumMemory:
    """Returns the memory that a train step of `c` needs at least, on a mesh with axes of `sizes`.

    Without `model.vocabulary`, the vocabulary counts as empty.
    """
    devices, tensor = math.prod(sizes.values()), sizes[TENSOR]
    weights = 4 * product_weights(c.model, c.model.vocabulary or 0) // devices
    tokens = c.train.batch_size * c.data.seq_len * tensor // devices
    width = c.model.dim + c.model.heads * c.model.head_dim // tensor
    layer = tokens // c.train.accumulate * width * jnp.dtype(c.model.dtype).itemsize
    layers = c.model.layers if c.model.remat in ("off", "on") else 1  # otherwise they are in the host's memory
    state, update = (1, 3) if c.optimizer.offload else (3, 1)
    return MinimumMemory(state * weights, update * weights, layers * layer, 5 * 4 * tokens)


def check_minimum(
    c: config.Config, mesh: jax.sharding.Mesh, memory: int | None, name: str = "memory", factor: int = 1
) -> None:
    """Raises ValueError if a train step of `c` needs more than `factor` times the `memory` of each device, in bytes.

    `memory` is None if it is unknown; `name` is used in the message. The message names the field that matters most.
    """
    needed = minimum_memory(c, mesh.shape)
    if memory is None or needed.total <= factor * memory:
        return
    device = mesh.devices.flat[0]
    field = min(SMALLEST, key=lambda field: minimum_memory(with_values(c, SMALLEST[field]), mesh.shape).total)
    section, _, key = field.partition(".")
    fix = f"reduce {option(field)}={vars(vars(c)[section])[key]}"
    if device.platform == "cpu":
        owned = f"its share of this machine's {name} is {bytes_in_words(memory)}"
    else:
        owned = f"has {bytes_in_words(memory)} of {name}"
        fix += f", or use at least {-(-needed.total * mesh.size // memory):,} devices"
    parts = ", ".join(f"{part} {bytes_in_words(size)}" for part, size in needed._asdict().items())
    needs = f"needs at least {bytes_in_words(needed.total)} for a train step ({parts})"
    raise ValueError(f"each of {mesh.size} {device.device_kind} devices {needs}, but {owned}; {fix}")


def check_free_memory(c: config.Config, mesh: jax.sharding.Mesh) -> None:
    """Raises ValueError if a train step of `c` needs more memory than is free on the devices of this process."""
    first, *others = jax.local_devices()
    memory = free_memory(first)
    if memory is not None and first.platform == "cpu":
        memory //= 1 + len(others)  # simulated devices share the host's memory
    check_minimum(c, mesh, memory, "free memory")
