"""From devices to a mesh. The only file that names mesh axes: others take the names and specs from here."""

import math
import os
from collections.abc import Mapping
from itertools import product
from typing import Any

import jax
from jax import P

from ringattn import config
from ringattn.layout import check_length

DATA, CONTEXT, TENSOR = "data", "context", "tensor"
"""Over which rows of a batch are spread; the ring, over which each row is; heads, feed-forward and vocabulary."""
AXES: tuple[str, ...] = (DATA, CONTEXT, TENSOR)
FSDP = (DATA, CONTEXT)
"""Parameters, gradients and optimizer state lie over both, so that a ring of 64 holds a 64th of the model, too."""
TOKENS = P(DATA, CONTEXT)
"""Of token arrays [B, L]."""
ACTIVATIONS = P(DATA, CONTEXT, None)
"""Of activations [B, L, E]."""
HEADS = P(DATA, CONTEXT, TENSOR, None)
"""Of queries, keys and values [B, L, H, D]."""

VOCABULARY_MULTIPLE = 128
"""Vocabulary tables are padded to a multiple of it, so that they divide over the tensor axis."""

FORCED = "--xla_force_host_platform_device_count"


def start(section: config.Mesh) -> jax.sharding.Mesh:
    """The mesh over all devices, its axes explicit and always all three, for `jax.set_mesh`.

    To be called before anything else touches a device: it starts the simulated CPU devices (each process's own;
    XLA_FLAGS=--xla_force_host_platform_device_count=N wins) and joins the other processes where the environment
    names them: JAX_COORDINATOR_ADDRESS with JAX_NUM_PROCESSES and JAX_PROCESS_ID, a Slurm step, a TPU pod.
    Raises ValueError, naming a mesh that fits, if the sizes do not use up the devices.
    """
    if section.simulate:
        _simulate(section.simulate)
    _join_processes()
    sizes = resolve(section, len(jax.devices()))
    if section.simulate and jax.default_backend() != "cpu":
        there = f"JAX already runs on {jax.default_backend()}"
        raise ValueError(f"mesh.simulate={section.simulate}, but {there}: start the mesh before anything else uses JAX")
    # jax.make_mesh orders the devices so that neighbours on an axis are neighbours on the wire.
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(jax.sharding.AxisType.Explicit,) * len(sizes))


def resolve(section: config.Mesh, devices: int) -> dict[str, int]:
    """Size of each axis, -1 replaced by what the others leave of `devices`; ValueError if they do not fit."""
    wanted = {DATA: section.data, CONTEXT: section.context, TENSOR: section.tensor}
    fixed = {name: size for name, size in wanted.items() if size != -1}
    rest, over = divmod(devices, math.prod(fixed.values()))
    if over or (rest != 1 and len(fixed) == len(wanted)):
        asked = " x ".join(f"{name}={size}" for name, size in wanted.items())
        cures = [_nearest(fixed, devices)]
        if not section.simulate and FORCED not in os.environ.get("XLA_FLAGS", ""):
            cures.append(f"--mesh.simulate {math.prod(fixed.values())} for simulated CPU devices")
        raise ValueError(f"mesh {asked} does not fit {devices} device{'s' * (devices > 1)}: use {', or '.join(cures)}")
    return {name: rest if size == -1 else size for name, size in wanted.items()}


def _nearest(fixed: Mapping[str, int], devices: int) -> str:
    """Flags for the mesh of `devices` that changes the fewest of the fixed sizes, and these the least."""
    divisors = [size for size in range(1, devices + 1) if devices % size == 0]
    fitting = [sizes for sizes in product(divisors, repeat=len(AXES)) if math.prod(sizes) == devices]

    def change(sizes: Mapping[str, int]) -> tuple[int, float, bool]:
        moved = [name for name in fixed if sizes[name] != fixed[name]]
        return len(moved), sum(abs(math.log(sizes[name] / fixed[name])) for name in moved), CONTEXT not in moved

    best = min((dict(zip(AXES, sizes, strict=True)) for sizes in fitting), key=change)
    return " ".join(f"--mesh.{name} {best[name]}" for name in fixed if best[name] != fixed[name])


def check(run: config.Config, mesh: jax.sharding.Mesh) -> None:
    """Raises ValueError, with sizes that fit, unless rows, tokens and parameters of `run` divide over `mesh`."""
    data, context, tensor = (mesh.shape[name] for name in AXES)
    check_length(run.data.seq_len, run.attention.layout, context, "data.seq_len")
    rows = ("mesh.data * train.accumulate", data * run.train.accumulate)
    _check_multiple("train.batch_size", run.train.batch_size, *rows)
    _check_multiple("model.dim", run.model.dim, "mesh.data * mesh.context", data * context)
    if VOCABULARY_MULTIPLE % tensor:
        least = max(size for size in range(1, tensor) if VOCABULARY_MULTIPLE % size == 0)
        rule = f"must divide {VOCABULARY_MULTIPLE}, the multiple to which the vocabulary is padded"
        raise ValueError(f"mesh.tensor={tensor} {rule}: use {least}")
    for name in ("heads", "kv_heads", "feed_forward"):
        _check_multiple(f"model.{name}", vars(run.model)[name], "mesh.tensor", tensor)


def _check_multiple(name: str, value: int, rule: str, unit: int) -> None:
    if value % unit:
        cure = config.nearest_multiples(value, unit)
        raise ValueError(f"{name}={value} must be a multiple of {rule} = {unit}: use {cure}")


def place(tree: Any, mesh: jax.sharding.Mesh, spec: jax.sharding.PartitionSpec) -> Any:
    """Global arrays from NumPy arrays that every process holds whole; each device gets its piece by `spec`."""
    sharding = jax.sharding.NamedSharding(mesh, spec)
    return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index]), tree)


def _simulate(count: int) -> None:
    jax.config.update("jax_platforms", "cpu")
    if FORCED in os.environ.get("XLA_FLAGS", ""):
        return
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:
        there = f"JAX already runs on {jax.device_count()} devices"
        raise ValueError(f"mesh.simulate={count}, but {there}: start the mesh before anything else uses JAX") from None


def _join_processes() -> None:
    environ = os.environ
    tasks, hosts = environ.get("SLURM_STEP_NUM_TASKS", "1"), environ.get("TPU_WORKER_HOSTNAMES", "")
    several = "JAX_COORDINATOR_ADDRESS" in environ or tasks != "1" or "," in hosts
    if not several or jax.distributed.is_initialized():
        return
    count, own = environ.get("JAX_NUM_PROCESSES"), environ.get("JAX_PROCESS_ID")
    try:  # JAX reads the address itself, but not these two; a cluster that it knows tells it all three
        jax.distributed.initialize(num_processes=int(count) if count else None, process_id=int(own) if own else None)
    except ValueError as error:
        cure = "set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID"
        raise ValueError(f"cannot join the other processes ({error}): {cure}") from None
