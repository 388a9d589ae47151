"""The Pallas kernels of a ring: their shapes, tiles, and the cycles of their calls in a compiled program."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import jax

from ringattn import config
from ringattn.attn.kernels.pallas_tpu import PallasTpu
from ringattn.attn.kernels.registry import choose_kernel
from ringattn.attn.kernels.xla import Xla
from ringattn.attn.mask import Mask
from ringattn.cost.cycles import CORES, CYCLE_FLOPS, KernelSchedule, TileCounts
from ringattn.cost.flops import attention_flops
from ringattn.cost.program import KernelCall, TileTrips
from ringattn.cost.visited import Ring, Tiling, ring_counts
from ringattn.mesh.axes import CONTEXT_OUTER, TENSOR, context_shards
from ringattn.model.families import layer_kinds, layer_mask

DIRECTIONS = {"forward": 1.0, "backward": 2.5}
"""FLOPs of the products relative to a forward pass: two forward; five backward, which computes the logits again."""


@dataclass(frozen=True)
class KernelSpec:
    """A kernel with the shapes and the mask for which it is compiled.

    Attributes:
      kernel: "ringattn" or "splash".
      direction: "forward" or "backward".
      window: number of earlier tokens that a token attends to; None: no window.
      segments: True if tokens have segment ids.
      run: number of consecutive tokens with consecutive positions.
    """

    kernel: str
    direction: str
    causal: bool
    window: int | None
    segments: bool
    heads: int
    kv_heads: int
    head_dim: int
    queries: int
    keys: int
    run: int
    dtype: str

    @property
    def mask(self) -> Mask:
        return Mask(self.causal, None if self.window is None else (self.window, 0))


class Heads(NamedTuple):
    """Heads and dtype of an attention call on one device."""

    heads: int
    kv_heads: int
    head_dim: int
    dtype: str


class CallCycles(NamedTuple):
    """Cycles of one call of a kernel, and of its visited tiles alone, as if they had no mask."""

    total: float
    visible: float


def ring_kernels(ring: Ring, shape: Heads, segments: bool) -> list[KernelSpec]:
    """Returns the forward and the backward kernel of a ring, for a hop."""
    return [
        KernelSpec(
            kernel="ringattn",
            direction=direction,
            causal=True,
            window=ring.mask.left,
            segments=segments,
            queries=ring.local,
            keys=ring.local,
            run=ring.local // 2,
            **shape._asdict(),
        )
        for direction in DIRECTIONS
    ]


def pallas_tilings(spec: KernelSpec, kind: str) -> dict[str, Tiling]:
    """Returns how the kernel "pallas" splits its work, by the name of its forward and backward kernel."""
    shape = {"heads": spec.heads, "kv_heads": spec.kv_heads, "head_dim": spec.head_dim, "dtype": spec.dtype}
    kernel = choose_kernel("pallas", **shape, device_kind=kind).kernel
    assert isinstance(kernel, PallasTpu)
    groups = kernel.groups(spec.heads, spec.kv_heads)
    return {
        "ringattn_forward": Tiling(kernel.tile, kernel.multiple, groups),
        "ringattn_backward": Tiling(kernel.backward_tile or kernel.tile, kernel.multiple, groups),
    }


def cores_at_work(kind: str, parallel: int) -> int:
    """Returns the cores that share a kernel's grid, whose first dim of size `parallel` is parallel."""
    cores = CORES.get(kind, 1)
    return cores if parallel % cores == 0 else 1


def pair_cycles(spec: KernelSpec, tiling: Tiling, call: KernelCall, kind: str) -> float:
    """Returns the cycles of the products of one pair of tiles, for one group of heads, at the peak of a device."""
    q_size, kv_size = tiling.sizes(call.queries, call.keys)
    flops = attention_flops(spec.heads // tiling.groups, spec.head_dim, q_size * kv_size)
    return DIRECTIONS[spec.direction] * flops / CYCLE_FLOPS[kind]


def call_cycles(
    kind: str, found: Mapping[KernelSpec, KernelSchedule | str], counts: Mapping[KernelCall, TileCounts]
) -> dict[KernelCall, CallCycles]:
    """Returns the cycles of each call in `counts`, by the schedules of the forward and the backward kernel.

    Raises ValueError if a kernel has no schedule, with the reason that `found` gives instead.
    """
    cycles = {}
    named = {f"ringattn_{spec.direction}": (spec, schedule) for spec, schedule in found.items()}
    for call, tiles in counts.items():
        spec, schedule = named[call.name]
        if isinstance(schedule, str):
            raise ValueError(f"{call.name}: {schedule}")
        tiling = pallas_tilings(spec, kind)[call.name]
        cores = cores_at_work(kind, tiling.groups)
        # The matrix units may be busy for longer than the bundles show.
        least = tiles.visited * pair_cycles(spec, tiling, call, kind)
        total, visible = schedule.cycles(tiles, cores=cores), schedule.full * tiles.visited / cores
        cycles[call] = CallCycles(max(total, least), max(visible, least))
    return cycles


def mean_counts(kinds: Iterable[tuple[float | int, Mapping[KernelCall, TileCounts]]]) -> dict[KernelCall, TileCounts]:
    """Returns the counts of each call, averaged over kinds of layers with these weights."""
    sums: dict[KernelCall, tuple[float, list[float]]] = {}
    for weight, counts in kinds:
        for call, tiles in counts.items():
            total, values = sums.get(call, (0.0, [0.0] * len(tiles)))
            sums[call] = total + weight, [old + weight * new for old, new in zip(values, tiles, strict=True)]
    return {call: TileCounts(*(value / total for value in values)) for call, (total, values) in sums.items()}


def step_rings(c: config.Config, mesh: jax.sharding.Mesh) -> list[tuple[int, Ring]]:
    """Returns the number of layers and the ring of each kind of layers, for rows of one document."""
    members = context_shards(mesh)
    return [
        (layers, Ring(layer_mask(c.model, kind), c.attention.layout, members, c.data.seq_len // members))
        for kind, layers in layer_kinds(c.model).items()
    ]


def step_heads(c: config.Model, mesh: jax.sharding.Mesh) -> Heads:
    """Returns the heads of one group of heads on one device of the axis `tensor`."""
    parts = mesh.shape[TENSOR] * c.head_groups
    return Heads(c.heads // parts, c.kv_heads // parts, c.head_dim, c.dtype)


def step_trips(c: config.Config, mesh: jax.sharding.Mesh, kind: str) -> TileTrips:
    """Returns the trips of a call of the kernel "xla" in a step, averaged over all layers.

    The strategies gather, ulysses and usp attend to more keys in a call than a ring over all context axes. Raises
    ValueError for the strategy "auto".
    """
    length = c.data.seq_len
    kernel = choose_kernel("xla", **step_heads(c.model, mesh)._asdict(), device_kind=kind).kernel
    assert isinstance(kernel, Xla)
    possible = {"ring": context_shards(mesh), "usp": mesh.shape[CONTEXT_OUTER], "gather": 1, "ulysses": 1}
    shards = possible.get(c.attention.strategy)
    if shards is None:
        raise ValueError(f"attention.strategy={c.attention.strategy!r} must be one of {', '.join(possible)}")
    full, partial, tiling = 0.0, 0.0, Tiling(kernel.tile)
    for layers, ring in step_rings(c, mesh):
        own = ring._replace(members=shards, local=length // shards)
        hops = len(list(ring.owners(0))) / len(list(own.owners(0)))
        counts = ring_counts(ring, dict.fromkeys(("ringattn_forward", "ringattn_backward"), tiling))
        forward = counts[KernelCall("ringattn_forward", ring.local, ring.local)]
        tiles = ring.local // tiling.sizes(ring.local, ring.local)[0]
        share = layers / c.model.layers * hops / tiles
        full, partial = full + share * forward.full, partial + share * forward.partial
    return TileTrips(full, partial, length // shards)
