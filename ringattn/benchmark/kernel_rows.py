"""Rows of the table of kernels: one hop of attention on one device, by kernel, mask, head dim and pass."""

from collections.abc import Iterator, Mapping
from itertools import product
from typing import TypedDict

import jax.numpy as jnp
import numpy as np

from ringattn import config
from ringattn.attn.mask import Mask, Tokens
from ringattn.cost.attention_kernels import DIRECTIONS, KernelSpec, cores_at_work, pallas_tilings
from ringattn.cost.cycles import CYCLE_FLOPS, KernelSchedule, TileCounts
from ringattn.cost.flops import attention_flops
from ringattn.cost.visited import count_tiles
from ringattn.planning.kernel_schedules import SPLASH_TILE

KERNELS = ("ringattn", "splash")
HEAD_DIMS = (64, 128, 256)
WINDOW = 1024
DOCUMENTS = 16


class KernelRow(TypedDict):
    """One hop of one kernel. All cycles are for all heads of one device."""

    topology: str
    kernel: str
    mask: str
    head_dim: int
    direction: str
    ideal: float
    """Products of visible pairs at the peak of the matrix units."""
    cycles: float
    utilisation: float
    partial: float | None
    """Bundles of a tile with a mask, relative to one without; None if the kernel does not distinguish them."""
    splash: float | None
    """Cycles relative to splash attention's for the same work; None if there are none."""


def kernel_specs(c: config.Benchmark) -> list[KernelSpec]:
    """Returns the kernels to compile. ringattn's serves full and causal hops alike."""
    specs: dict[KernelSpec, None] = {}
    for kernel, direction, (mask, head_dim) in product(KERNELS, DIRECTIONS, _cells(c)):
        specs[_spec(c, kernel, mask, head_dim, direction)] = None
    return list(specs)


def _cells(c: config.Benchmark) -> Iterator[tuple[str, int]]:
    """Yields masks and head dims of the table; masks with more than positions only at the config's head dim."""
    yield from product(("full", "causal", "window", "documents"), (c.head_dim,))
    yield from product(("full", "causal"), (dim for dim in HEAD_DIMS if dim != c.head_dim))


def _spec(c: config.Benchmark, kernel: str, mask: str, head_dim: int, direction: str) -> KernelSpec:
    tokens = c.shard_tokens[0]
    return KernelSpec(
        kernel=kernel,
        direction=direction,
        causal=mask != "full" or kernel == "ringattn",
        window=WINDOW if mask == "window" else None,
        segments=mask == "documents",
        heads=c.heads,
        kv_heads=c.kv_heads,
        head_dim=head_dim,
        queries=tokens,
        keys=tokens,
        run=tokens // 2,
        dtype=c.dtype,
    )


def kernel_rows(
    c: config.Benchmark, topology: str, kind: str, schedules: Mapping[KernelSpec, KernelSchedule | str]
) -> list[KernelRow]:
    """Returns the rows of all kernels that compiled."""
    rows, splash = [], {}
    for kernel, direction, (mask, head_dim) in product(reversed(KERNELS), DIRECTIONS, _cells(c)):
        spec = _spec(c, kernel, mask, head_dim, direction)
        schedule = schedules[spec]
        if isinstance(schedule, str):
            continue
        cycles = hop_cycles(spec, mask, schedule, kind)
        if kernel == "splash":
            splash[mask, head_dim, direction] = cycles
        flops = DIRECTIONS[direction] * attention_flops(c.heads, head_dim, _visible_pairs(mask, spec.queries))
        distinguishes = schedule.partial != schedule.full and mask != "full"
        rows.append(
            KernelRow(
                topology=topology,
                kernel=kernel,
                mask=_name(mask),
                head_dim=head_dim,
                direction=direction,
                ideal=flops / CYCLE_FLOPS[kind],
                cycles=cycles,
                utilisation=flops / CYCLE_FLOPS[kind] / cycles,
                partial=schedule.partial / schedule.full if distinguishes else None,
                splash=cycles / splash[mask, head_dim, direction] if (mask, head_dim, direction) in splash else None,
            )
        )
    order = {kernel: n for n, kernel in enumerate(KERNELS)}
    return sorted(rows, key=lambda row: (row["head_dim"] != c.head_dim, row["head_dim"], order[row["kernel"]]))


def _name(mask: str) -> str:
    return {"window": f"window {WINDOW:,}", "documents": f"{DOCUMENTS} documents"}.get(mask, mask)


def _tokens(mask: str, length: int) -> tuple[Mask, Tokens, Tokens]:
    """Returns the mask, queries and keys of a hop; 'full': all keys precede all queries."""
    positions = np.arange(length, dtype=np.int32)[None]
    segments = positions * DOCUMENTS // length if mask == "documents" else None
    queries = positions + length if mask == "full" else positions
    window = (WINDOW, 0) if mask == "window" else None
    return Mask(True, window), Tokens(jnp.asarray(queries), segments), Tokens(jnp.asarray(positions), segments)


def _visible_pairs(mask: str, length: int) -> int:
    if mask == "full":
        return length * length
    preceding = np.arange(length, dtype=np.int64)
    if mask == "documents":
        preceding %= length // DOCUMENTS
    return int((np.minimum(preceding, WINDOW) if mask == "window" else preceding).sum()) + length


def hop_cycles(spec: KernelSpec, mask: str, schedule: KernelSchedule, kind: str) -> float | int:
    """Returns the cycles of a hop of a kernel, with its whole grid."""
    shape, q, kv = _tokens(mask, spec.queries)
    by_keys = spec.direction == "backward"
    if spec.kernel == "ringattn":
        tiling = pallas_tilings(spec, kind)[f"ringattn_{spec.direction}"]
        counts = count_tiles(shape, q, kv, tiling.sizes(spec.queries, spec.keys), tiling.groups, by_keys)
        return schedule.cycles(counts, cores=cores_at_work(kind, tiling.groups))
    # A grid step of splash attention is one pair of tiles of one query head. Its grid is as wide as the row with the
    # most visible tiles. Static segments do not shrink it.
    static = q._replace(segments=None), kv._replace(segments=None)
    counts = count_tiles(shape, *static, (SPLASH_TILE, SPLASH_TILE), spec.heads, by_keys)
    tiles = spec.queries // SPLASH_TILE
    widest = min(tiles, {"window": -(-WINDOW // SPLASH_TILE) + 1}.get(mask, tiles))
    rows = spec.heads * tiles
    return schedule.cycles(TileCounts(rows * widest, *counts[1:3]), rows, cores_at_work(kind, spec.heads))


def describe(spec: KernelSpec) -> str:
    """Describes a kernel in a line of progress."""
    mask = "causal" if spec.causal else "full"
    mask += f" window={spec.window}" * (spec.window is not None) + " segments" * spec.segments
    return f"{spec.kernel} {spec.direction}, {mask}, head_dim={spec.head_dim}"
