"""Changes of a step that reduce its memory, with the bytes that each saves by estimate."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ringattn import config
from ringattn.config.stages import with_values
from ringattn.cost.minimum import host_bytes, minimum_memory, saved_bytes
from ringattn.mesh.axes import CONTEXT, DATA, TENSOR
from ringattn.mesh.devices import check_divisible
from ringattn.planning.candidates import RUNGS
from ringattn.planning.longest import Need
from ringattn.planning.topologies import double
from ringattn.units import bytes_in_words


@dataclass(frozen=True)
class Change:
    """A change that reduces the memory of a step."""

    option: str
    """Words of the command line."""
    saves: int
    """Bytes per device that it saves by estimate: of the host if its memory does not suffice, else of the device."""
    tried: Need | None = None
    """Memory of the changed step; None if it was not compiled."""

    def __str__(self) -> str:
        if self.tried is None:
            return f"{self.option}: about {bytes_in_words(self.saves)} less"
        if self.tried.refusal is not None:
            return f"{self.option}: does not fit: {self.tried.refusal}"
        host = f" and {bytes_in_words(self.tried.host)} of the host" if self.tried.host else ""
        return f"{self.option}: fits, {bytes_in_words(self.tried.peak or 0)}{host}"


class ChangedStep(NamedTuple):
    """A change, and the step with it."""

    change: Change
    config: config.Config
    topology: str | None
    """The topology with the change; None if it is the same."""


def lacks_host(refusal: str) -> bool:
    """Returns True if a step was refused because the memory of the host does not suffice."""
    return "host" in refusal.lower()


def changed_steps(c: config.Config, mesh: jax.sharding.Mesh, topology: str, refusal: str) -> list[ChangedStep]:
    """Returns the changes that reduce the memory of a step, in order of their estimated effect."""
    kind = int(lacks_host(refusal))
    before = _estimated(c, dict(mesh.shape))[kind]
    found = []
    for values in _values(c, mesh):
        with suppress(ValueError):  # such as a length that the ring does not divide
            changed = with_values(c, values)
            check_divisible(changed, mesh)
            option = " ".join(f"--{name} {value}" for name, value in values.items())
            found.append(
                ChangedStep(Change(option, before - _estimated(changed, dict(mesh.shape))[kind]), changed, None)
            )
    larger = double(topology)
    if larger is not None and mesh.devices.flat[0].platform != "cpu":  # CPU devices share the memory of this machine
        sizes = {**mesh.shape, CONTEXT: 2 * mesh.shape[CONTEXT]}
        option = f"--topology {larger}" + ("" if c.mesh.context == -1 else f" --mesh.context {sizes[CONTEXT]}")
        found.append(ChangedStep(Change(option, before - _estimated(c, sizes)[kind]), c, larger))
    return sorted((each for each in found if each.change.saves > 0), key=lambda each: -each.change.saves)


def _values(c: config.Config, mesh: jax.sharding.Mesh) -> Iterator[dict[str, Any]]:
    """Yields values of fields: rungs of remat, groups of heads, offloaded moments, microbatches, half the length."""
    for remat in RUNGS[RUNGS.index(c.model.remat) + 1 :]:
        yield {"model.remat": remat}
    groups = c.model.kv_heads // mesh.shape[TENSOR]
    if groups > c.model.head_groups:
        yield {"model.head_groups": groups}
    if not c.optimizer.offload:
        yield {"optimizer.offload": True}
    rows = c.train.batch_size // mesh.shape[DATA]
    if rows > c.train.accumulate:
        yield {"train.accumulate": rows}
    yield {"data.seq_len": c.data.seq_len // 2}


def _estimated(c: config.Config, sizes: dict[str, int]) -> tuple[int, int]:
    """Returns the bytes of device and host: state, and gradients or else saved activations and a layer's attention."""
    minimum, saved, model = minimum_memory(c, sizes), saved_bytes(c, sizes), c.model
    tokens = minimum.batch // 20 // c.train.accumulate
    itemsize, tensor = jnp.dtype(model.dtype).itemsize, sizes[TENSOR]
    attention = 2 * (model.heads + model.kv_heads) * model.head_dim // tensor
    device = saved.device
    if device is None:  # inputs and results of the norms, of attention and of the feed-forward layer
        device = model.layers * tokens * (4 * model.dim + attention + 3 * model.feed_forward // tensor) * itemsize
    device += 2 * tokens * attention * itemsize // model.head_groups  # values and gradients
    return minimum.state + minimum.batch + max(minimum.gradient, device), host_bytes(c, sizes)


def order(found: Sequence[Change]) -> str:
    """Returns the order of the changes in words."""
    if found[0].tried is not None:
        return "each compiled"
    return "by estimated effect (--changes True compiles each)"
