"""From devices to a mesh. The only file that names mesh axes: others take the names and specs from here."""

import hashlib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any

import jax
import numpy as np
from jax import P
from jax.experimental import multihost_utils

from ringattn import config
from ringattn.layout import check_length

DATA, CONTEXT_OUTER, CONTEXT, TENSOR = "data", "context_outer", "context", "tensor"
"""Over these lie a batch's rows; a row's tokens (rings, and a ring); heads, feed-forward and vocabulary."""
AXES: tuple[str, ...] = (DATA, CONTEXT_OUTER, CONTEXT, TENSOR)
SEQUENCE = (CONTEXT_OUTER, CONTEXT)
"""Over which a row's tokens are spread: the axis of attention."""
FSDP = (DATA, *SEQUENCE)
"""Parameters, gradients and optimizer state lie over all these, so that a ring of 64 holds a 64th of the model, too."""
TOKENS = P(DATA, SEQUENCE)
"""Of token arrays [B, L]."""
ACTIVATIONS = P(DATA, SEQUENCE, None)
"""Of activations [B, L, E]."""
HEADS = P(DATA, SEQUENCE, TENSOR, None)
"""Of queries, keys and values [B, L, H, D]."""

VOCABULARY_MULTIPLE = 128
"""Vocabulary tables are padded to a multiple of it, so that they divide over the tensor axis."""

FORCED = "--xla_force_host_platform_device_count"


def start(section: config.Mesh) -> jax.sharding.Mesh:
    """The mesh over all devices, its axes explicit and always all four, for `jax.set_mesh`.

    To be called before anything else touches a device: it starts the simulated CPU devices (each process's own;
    XLA_FLAGS=--xla_force_host_platform_device_count=N wins) and joins the other processes where the environment
    names them: JAX_COORDINATOR_ADDRESS with JAX_NUM_PROCESSES and JAX_PROCESS_ID, a Slurm step, a TPU pod.
    Raises ValueError, naming a mesh that fits, if the sizes do not use up the devices.
    """
    if section.simulate:
        _simulate(section.simulate)
    _join_processes()
    mesh = over_all(section)
    if section.simulate and jax.default_backend() != "cpu":
        there = f"JAX already runs on {jax.default_backend()}"
        raise ValueError(f"mesh.simulate={section.simulate}, but {there}: start the mesh before anything else uses JAX")
    return mesh


def over_all(section: config.Mesh) -> jax.sharding.Mesh:
    """Another mesh over all devices, once `start` has been called; raises ValueError as it does."""
    return arrange(resolve(section, len(jax.devices())), jax.devices())


def ring(size: int) -> jax.sharding.Mesh:
    """The mesh whose ring is the first `size` devices, its other axes of size 1; `start` comes before it."""
    devices = jax.devices()
    if not 1 <= size <= len(devices):
        raise ValueError(f"a ring of {size} does not fit {len(devices)} device{'s' * (len(devices) > 1)}")
    return arrange({DATA: 1, CONTEXT_OUTER: 1, CONTEXT: size, TENSOR: 1}, devices[:size])


def arrange(sizes: Mapping[str, int], devices: Sequence[Any]) -> jax.sharding.Mesh:
    """The mesh of these sizes, its axes explicit; on TPUs each ring is a closed walk from chip to neighbouring chip.

    `devices` may be compile-only (`jax.experimental.topologies`). Where they are a whole box of chips, each ring gets a
    smaller box, if there is one that can be walked so: where the next chip is far, as from the end of one row of chips
    to the beginning of the next, the compiler does not send while it computes.
    """
    explicit = (jax.sharding.AxisType.Explicit,) * len(sizes)
    if devices[0].platform != "tpu":
        return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=explicit, devices=devices)
    placed = np.empty(len(devices), object)
    placed[:] = list(devices)
    order = ring_boxes(sizes, [(*chip.coords, chip.core_on_chip) for chip in devices])
    placed = placed.reshape(tuple(sizes.values())) if order is None else placed[order]
    return jax.sharding.Mesh(placed, tuple(sizes), axis_types=explicit)


def ring_boxes(sizes: Mapping[str, int], places: Sequence[Sequence[int]]) -> np.ndarray | None:
    """Indices of `places`, of the shape of `sizes`, each ring in a box of its own; None if they are no whole box."""
    sides = [sorted(set(side)) for side in zip(*places, strict=True)]
    cells = {tuple(place): index for index, place in enumerate(places)}
    box = tuple(map(len, sides))
    if len(cells) < len(places) or math.prod(box) != len(places):
        return None
    grid = np.array([cells[cell] for cell in product(*sides)]).reshape(box)
    context = list(sizes).index(CONTEXT)
    others = [n for n in range(len(sizes)) if n != context]

    def cost(split: Sequence[tuple[int, ...]]) -> tuple[bool, int]:
        """Whether the rings do not close, and on how many sides another axis goes in steps of a ring's box."""
        stepped = [min(pair) > 1 for n in others for pair in zip(split[n], split[context], strict=True)]
        return closed_walk(split[context]) is None, sum(stepped)

    split = min(_splits(tuple(sizes.values()), box), key=cost, default=None)
    if split is None:
        return None
    # Each side of the box falls into a factor for every axis, the ring's the innermost: its chips lie together.
    by = [*others, context]
    parts = grid.reshape([split[n][k] for k in range(len(box)) for n in by])
    axes = [k * len(by) + by.index(n) for n in range(len(sizes)) for k in range(len(box))]
    found = parts.transpose(axes).reshape(tuple(sizes.values()))
    walk = closed_walk(split[context])
    return found if walk is None else found.take(walk, axis=context)


def _splits(sizes: tuple[int, ...], box: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], ...]]:
    """All ways to give each axis a factor of each side, so that an axis' factors multiply to its size."""
    if not sizes:
        yield from [()] if math.prod(box) == 1 else []
        return
    for part in product(*([n for n in range(1, side + 1) if side % n == 0] for side in box)):
        if math.prod(part) == sizes[0]:
            rest = tuple(side // n for side, n in zip(box, part, strict=True))
            yield from ((part, *others) for others in _splits(sizes[1:], rest))


def closed_walk(box: tuple[int, ...]) -> list[int] | None:
    """The cells of a box, numbered in C order, so that each is next to the one before, and the first to the last.

    None where there is none: an odd number of cells, or a single row of more than two. One or two are as they are.
    """
    size = math.prod(box)
    if size <= 2:
        return list(range(size))
    across = [n for n, side in enumerate(box) if side > 1 and size // side % 2 == 0]
    if not across:
        return None
    n = across[0]
    rows = _back_and_forth(box[:n] + box[n + 1 :])
    # Back and forth over all rows but for their first cells, which are the way home.
    there = [(*row[:n], x, *row[n:]) for at, row in enumerate(rows) for x in range(1, box[n])[:: 1 - 2 * (at % 2)]]
    home = [(*row[:n], 0, *row[n:]) for row in reversed(rows)]
    return [int(np.ravel_multi_index(cell, box)) for cell in there + home]


def _back_and_forth(box: tuple[int, ...]) -> list[tuple[int, ...]]:
    """All cells of a box, each next to the one before."""
    if not box:
        return [()]
    inner = _back_and_forth(box[1:])
    return [(x, *rest) for x in range(box[0]) for rest in inner[:: 1 - 2 * (x % 2)]]


def resolve(section: config.Mesh, devices: int) -> dict[str, int]:
    """Size of each axis, -1 replaced by what the others leave of `devices`; ValueError if they do not fit."""
    wanted = {name: vars(section)[name] for name in AXES}
    fixed = {name: size for name, size in wanted.items() if size != -1}
    rest, over = divmod(devices, math.prod(fixed.values()))
    if over or (rest != 1 and len(fixed) == len(wanted)):
        asked = in_words(wanted)
        cures = [_nearest(fixed, devices)]
        if not section.simulate and FORCED not in os.environ.get("XLA_FLAGS", ""):
            cures.append(f"--mesh.simulate {math.prod(fixed.values())} for simulated CPU devices")
        raise ValueError(f"mesh {asked} does not fit {devices} device{'s' * (devices > 1)}: use {', or '.join(cures)}")
    return {name: rest if size == -1 else size for name, size in wanted.items()}


def in_words(sizes: Mapping[str, int]) -> str:
    """'data=2 x context=4 x tensor=1'; rings of rings are named where there are several."""
    return " x ".join(f"{name}={size}" for name, size in sizes.items() if name != CONTEXT_OUTER or size != 1)


def _nearest(fixed: Mapping[str, int], devices: int) -> str:
    """Flags for the mesh of `devices` that changes the fewest of the fixed sizes, and these the least."""
    divisors = [size for size in range(1, devices + 1) if devices % size == 0]
    fitting = [sizes for sizes in product(divisors, repeat=len(AXES)) if math.prod(sizes) == devices]

    def change(sizes: Mapping[str, int]) -> tuple[int, float, bool]:
        moved = [name for name in fixed if sizes[name] != fixed[name]]
        return len(moved), sum(abs(math.log(sizes[name] / fixed[name])) for name in moved), CONTEXT not in moved

    best = min((dict(zip(AXES, sizes, strict=True)) for sizes in fitting), key=change)
    return " ".join(f"--mesh.{name} {best[name]}" for name in fixed if best[name] != fixed[name])


def shards(mesh: jax.sharding.Mesh) -> int:
    """Devices over which each row is spread."""
    return math.prod(mesh.shape[name] for name in SEQUENCE)


def check(run: config.Config, mesh: jax.sharding.Mesh) -> None:
    """Raises ValueError, with sizes that fit, unless rows, tokens and parameters of `run` divide over `mesh`."""
    data, context, tensor = mesh.shape[DATA], mesh.shape[CONTEXT], mesh.shape[TENSOR]
    check_length(run.data.seq_len, run.attention.layout, shards(mesh), "data.seq_len")
    rows = ("mesh.data * train.accumulate", data * run.train.accumulate)
    _check_multiple("train.batch_size", run.train.batch_size, *rows)
    of_rings = "mesh.context_outer * mesh.context" if mesh.shape[CONTEXT_OUTER] > 1 else "mesh.context"
    _check_multiple("model.dim", run.model.dim, f"mesh.data * {of_rings}", data * shards(mesh))
    if VOCABULARY_MULTIPLE % tensor:
        least = max(size for size in range(1, tensor) if VOCABULARY_MULTIPLE % size == 0)
        rule = f"must divide {VOCABULARY_MULTIPLE}, the multiple to which the vocabulary is padded"
        raise ValueError(f"mesh.tensor={tensor} {rule}: use {least}")
    exchanged = {"ulysses": (of_rings, shards(mesh)), "usp": ("mesh.context", context)}
    if run.attention.strategy in exchanged:
        axes, size = exchanged[run.attention.strategy]
        name = f"attention.strategy={run.attention.strategy}: model.kv_heads"
        _check_multiple(name, run.model.kv_heads, f"mesh.tensor * {axes}", tensor * size)
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


def abstract(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    """Shapes, as `jax.eval_shape` gives them under the mesh, of arrays that lie on it; what says no spec lies whole."""

    def placed(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        spec = P() if leaf.sharding is None else leaf.sharding.spec
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=jax.NamedSharding(mesh, spec))

    return jax.tree.map(placed, tree)


def check_same(what: str, text: str) -> None:
    """Raises ValueError, in every process, unless all of them call this with the same `text`; `what` is its name."""
    if jax.process_count() > 1:
        own = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.int32)
        others = np.flatnonzero(np.any(multihost_utils.process_allgather(own) != own, axis=-1))
        if others.size:
            here = f"process {jax.process_index()} has another {what} than process {others[0]}"
            raise ValueError(f"{here}: start all processes with the same command, on the same files")


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
