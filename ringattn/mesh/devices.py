"""Initializes devices and processes, and builds and checks the mesh of a config."""

import math
import os
from collections.abc import Mapping
from itertools import product
from typing import Any

import jax

from ringattn import config
from ringattn.compilation_cache import disable_for_cpus
from ringattn.config import option
from ringattn.layout import check_length
from ringattn.mesh.axes import (
    AXES,
    CONTEXT,
    CONTEXT_OUTER,
    DATA,
    TENSOR,
    VOCABULARY_MULTIPLE,
    describe_sizes,
    sequence_shards,
)
from ringattn.mesh.gpu_flags import add_gpu_flags
from ringattn.mesh.processes import join_processes
from ringattn.mesh.topology import arrange_devices
from ringattn.units import first_line

FORCED = "--xla_force_host_platform_device_count"
START_FIRST = "restart Python and call ringattn.mesh.devices.start before other JAX code"
MAX_SIMULATED = 1024
"""Maximum number of simulated devices. Each uses one or two threads, and a process can start a few thousand."""


def start(section: config.Mesh) -> jax.sharding.Mesh:
    """Initializes JAX's devices and returns a mesh over all of them, with four explicit axes, for `jax.set_mesh`.

    Call it before any other use of JAX devices. It creates the simulated CPU devices (per process;
    XLA_FLAGS=--xla_force_host_platform_device_count=N takes precedence) and joins the other processes of a run of
    several: see `launchers.find_place`. With an NVIDIA GPU it adds flags to XLA_FLAGS: see `gpu_flags.py`. On several
    CPU devices it disables JAX's persistent compilation cache: see `compilation_cache.py`.

    Raises:
      ValueError: if the axis sizes do not multiply to the number of devices (the message suggests a mesh), if JAX is
        already initialized on other devices, if it finds no device, or if the processes cannot join.
    """
    join(section)
    mesh = build_mesh(section)
    disable_for_cpus(mesh.abstract_mesh)
    if section.simulate and jax.default_backend() != "cpu":
        running = f"JAX already runs on {jax.default_backend()}"
        raise ValueError(f"mesh.simulate={section.simulate}, but {running}; {START_FIRST}")
    return mesh


def join(section: config.Mesh) -> None:
    """Runs the first part of `start`. Does not initialize the devices of a single process. Raises ValueError."""
    if section.simulate:
        _simulate(section.simulate)
    else:
        add_gpu_flags()
    join_processes()


def build_mesh(section: config.Mesh) -> jax.sharding.Mesh:
    """Returns a mesh over all devices. Call it after `start`. Raises ValueError: see `resolve`."""
    devices = _devices()
    return arrange_devices(resolve(section, len(devices)), devices)


def _devices() -> list[Any]:
    """Returns `jax.devices()`. Raises ValueError if JAX finds no device of the platform that JAX_PLATFORMS names."""
    try:
        return jax.devices()
    except (AssertionError, RuntimeError) as error:  # JAX_PLATFORMS=cuda without CUDA gives an empty AssertionError
        reason = f" ({first_line(error)})" if str(error) else ""
        fix = "install its plugin, such as pip install -e '.[cuda]', or unset JAX_PLATFORMS"
        platforms = os.environ.get("JAX_PLATFORMS", "")
        raise ValueError(f"JAX_PLATFORMS={platforms}: JAX finds no such device{reason}; {fix}") from None


def ring_mesh(size: int) -> jax.sharding.Mesh:
    """Returns a mesh with a ring of the first `size` devices; other axes have size 1. Call it after `start`."""
    devices = jax.devices()
    if not 1 <= size <= len(devices):
        raise ValueError(f"a ring of {size} does not fit {len(devices)} device{'s' * (len(devices) > 1)}")
    return arrange_devices({DATA: 1, CONTEXT_OUTER: 1, CONTEXT: size, TENSOR: 1}, devices[:size])


def resolve(section: config.Mesh, devices: int) -> dict[str, int]:
    """Returns the size of each axis, with -1 resolved. Raises ValueError if they do not multiply to `devices`."""
    requested = {name: vars(section)[name] for name in AXES}
    fixed = {name: size for name, size in requested.items() if size != -1}
    inferred, remainder = divmod(devices, math.prod(fixed.values()))
    if remainder or (inferred != 1 and len(fixed) == len(requested)):
        sizes = describe_sizes(requested)
        fixes = [_nearest(fixed, devices)]
        simulated = math.prod(fixed.values())
        if not section.simulate and simulated <= MAX_SIMULATED and FORCED not in os.environ.get("XLA_FLAGS", ""):
            fixes.append(f"--mesh.simulate {simulated} for simulated CPU devices")
        raise ValueError(f"mesh {sizes} does not fit {devices} device{'s' * (devices > 1)}; use {', or '.join(fixes)}")
    return {name: inferred if size == -1 else size for name, size in requested.items()}


def _nearest(fixed: Mapping[str, int], devices: int) -> str:
    """Returns the options of a mesh of `devices` devices that changes as few of the `fixed` sizes as possible.

    Of several such meshes, it takes the one with the smallest factors between old and new sizes.
    """
    divisors = [size for size in range(1, devices + 1) if devices % size == 0]
    fitting = [sizes for sizes in product(divisors, repeat=len(AXES)) if math.prod(sizes) == devices]

    def change(sizes: Mapping[str, int]) -> tuple[int, float, bool]:
        changed = [name for name in fixed if sizes[name] != fixed[name]]
        return len(changed), sum(abs(math.log(sizes[name] / fixed[name])) for name in changed), CONTEXT not in changed

    best = min((dict(zip(AXES, sizes, strict=True)) for sizes in fitting), key=change)
    return " ".join(f"--{option(f'mesh.{name}')} {best[name]}" for name in fixed if best[name] != fixed[name])


def check_divisible(run: config.Config, mesh: jax.sharding.Mesh) -> None:
    """Raises ValueError, with valid sizes, unless batch, sequence and parameters of `run` divide over `mesh`."""
    check_sizes(run, mesh.shape)


def check_kernel(run: config.Config, platform: str) -> None:
    """Raises ValueError if `attention.kernel` cannot train on devices of `platform`."""
    if run.attention.kernel == "pallas" and platform == "cpu":
        rule = "trains on TPUs only: on CPU devices an interpreter runs it, which has no rematerialization"
        raise ValueError(f"attention.kernel='pallas' {rule}; use --attention.kernel auto")
    if run.attention.kernel == "cudnn" and run.data.separate_documents:
        rule = "cannot keep documents separate; use --attention.kernel auto, or --data.separate_documents False"
        raise ValueError(f"attention.kernel='cudnn' {rule}")


def check_sizes(run: config.Config, sizes: Mapping[str, int]) -> None:
    """Raises ValueError as `check_divisible`, for a mesh with axes of `sizes`."""
    data, context, tensor = sizes[DATA], sizes[CONTEXT], sizes[TENSOR]
    data_name, context_name = option("mesh.data"), option("mesh.context")
    sequence_name = context_name
    if sizes[CONTEXT_OUTER] > 1:
        sequence_name = f"{option('mesh.context_outer')} * {context_name}"
    sequence = (sequence_name, sequence_shards(sizes))
    check_length(run.data.seq_len, run.attention.layout, sequence[1], option("data.seq_len"), sequence_name)
    microbatches = (f"{data_name} * train.accumulate", data * run.train.accumulate)
    _check_multiple(option("train.batch_size"), run.train.batch_size, *microbatches)
    _check_multiple("model.dim", run.model.dim, f"{data_name} * {sequence_name}", data * sequence[1])
    if VOCABULARY_MULTIPLE % tensor:
        divisor = max(size for size in range(1, tensor) if VOCABULARY_MULTIPLE % size == 0)
        rule = f"must divide {VOCABULARY_MULTIPLE}, because the vocabulary is padded to a multiple of it"
        raise ValueError(f"mesh.tensor={tensor} {rule}; use {divisor}")
    parts, each = "mesh.tensor", tensor
    if run.model.head_groups > 1:
        parts, each = f"{parts} * model.head_groups", each * run.model.head_groups
    all_to_all = {"ulysses": sequence, "usp": (context_name, context)}
    if run.attention.strategy in all_to_all:
        axes, size = all_to_all[run.attention.strategy]
        reason = f" for attention.strategy={run.attention.strategy!r}"
        _check_multiple("model.kv_heads", run.model.kv_heads, f"{parts} * {axes}", each * size, reason)
    for name in ("heads", "kv_heads"):
        _check_multiple(f"model.{name}", vars(run.model)[name], parts, each)
    _check_multiple("model.feed_forward", run.model.feed_forward, "mesh.tensor", tensor)


def _check_multiple(name: str, value: int, rule: str, unit: int, reason: str = "") -> None:
    if value % unit:
        fix = config.nearest_multiples(value, unit)
        raise ValueError(f"{name}={value} must be a multiple of {rule} = {unit}{reason}; use {fix}")


def _simulate(count: int) -> None:
    if count > MAX_SIMULATED:
        rule = f"must be at most {MAX_SIMULATED}, because simulated devices are threads of one process"
        raise ValueError(f"mesh.simulate={count} {rule}")
    jax.config.update("jax_platforms", "cpu")
    if FORCED in os.environ.get("XLA_FLAGS", ""):
        return
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:
        if jax.default_backend() == "cpu" and jax.local_device_count() == count:
            return  # an earlier call has simulated them
        running = f"JAX already runs on {jax.device_count()} devices"
        raise ValueError(f"mesh.simulate={count}, but {running}; {START_FIRST}") from None
