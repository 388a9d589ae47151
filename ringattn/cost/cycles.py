"""Cycles of compiled TPU programs, read from the text that the TPU compiler writes. Needs no TPU.

Two sources, because the compiler does not estimate Pallas kernels:

- Scheduled HLO (`compiled.as_text()`): the compiler's `estimated_cycles` of each op, times the trips of its loops.
- The final schedule of a Pallas kernel (`*-final_bundles.txt` of `--xla_jf_dump_to`): its bundles, instruction words of
  which a core issues one per cycle, times the tiles that the kernel visits.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

CYCLE_FLOPS = {
    "TPU v3": 65_536,
    "TPU v4": 262_144,
    "TPU v4 core": 131_072,
    "TPU v5 lite": 131_072,
    "TPU v5": 262_144,
    "TPU v6 lite": 524_288,
    "TPU7x": 524_288,
}
"""Dense bfloat16 FLOPs per cycle of a JAX device, by `chip_name`: all of its matrix units, busy in every cycle.

A core of v3 has two units of 128 x 128 multiply-adds, one of v4, v5e and v5p four of them
(`jax/_src/pallas/mosaic/tpu_info.py`), and a device of v4 and v5p two cores. These give the chip's peak FLOP/s
(`hardware.CHIPS`) at a clock of 0.94 GHz (v3), 1.05 (v4), 1.5 (v5e) and 1.75 (v5p). A core of v6e and TPU7x has two
units of 256 x 256. With two products per cycle and multiplier they give the peak FLOP/s at 1.75 and 2.2 GHz; the
compiler's own estimate of a large product, which exceeds one per cycle, agrees.
"""
CORES = {"TPU v4": 2, "TPU v5": 2}
"""TensorCores per JAX device, where it is not 1. Each runs half of a kernel's parallel grid."""
LARGE_SEGMENT = 100
"""Bundles of a conditional segment that is not bookkeeping."""

_BUNDLE = re.compile(r"\s*(?:0x[0-9a-f]+|0)\s+([A-Z]{2})?\s*:\s*(>*)\s*\{(.*)")


class TileCounts(NamedTuple):
    """Numbers of grid steps and of pairs of tiles in one call of a kernel on one device."""

    steps: float
    full: float
    """Visited pairs without a mask."""
    partial: float
    """Visited pairs with a mask."""
    searched: float = 0.0
    """Empty pairs that the kernel tests and passes over."""
    idle: float = 0.0
    """Grid steps of the forward kernel that visit no tile."""

    @property
    def visited(self) -> float | int:
        return self.full + self.partial


class KernelSchedule(NamedTuple):
    """Bundles of a Pallas kernel."""

    step: int
    """Per grid step, outside of its loop over tiles."""
    full: int
    """Per visited pair of tiles without a mask, with its bookkeeping."""
    partial: int
    """Per visited pair of tiles with a mask, with its bookkeeping."""
    search: int = 0
    """Per empty pair that is passed over."""
    ends: int = 0
    """Per row of tiles, at its begin and end; for kernels whose grid step is one pair of tiles."""
    work: int = 0
    """Per grid step that visits a tile, in addition to `step`."""

    def cycles(self, counts: TileCounts, rows: float | int = 0, cores: int = 1) -> float | int:
        """Returns the cycles of one call. `rows` is the number of rows of tiles; `cores` share the grid evenly."""
        own = self.step * counts.steps + self.work * (counts.steps - counts.idle)
        own += self.search * counts.searched + self.ends * rows
        return (own + self.full * counts.full + self.partial * counts.partial) / cores


class _Segment(NamedTuple):
    """Consecutive bundles without a label or a branch."""

    depth: int
    conditional: bool
    bundles: int


def kernel_schedule(text: str, skips_steps: bool = False) -> KernelSchedule:
    """Returns the bundles of a kernel from the text of its `*-final_bundles.txt`.

    With `skips_steps`, grid steps that visit no tile run no large segment. The first one, which copies the results of
    rows without any visible key, is then not counted.

    In this text the number of '>' is the depth of the loop. Depth 1 is a grid step. A kernel that loops over tiles does
    so at depth 2, and searches for the next tile at depth 3. A conditional segment at least half as long as the longest
    one is a pair of tiles: the first without a mask, the second with one.
    """
    segments = list(_segments(text))
    loops = [segment for segment in segments if segment.depth == 2]
    depth = 2 if sum(segment.bundles for segment in loops) > LARGE_SEGMENT else 1
    large = [s for s in segments if s.depth == depth and s.conditional and s.bundles >= LARGE_SEGMENT]
    longest = max((segment.bundles for segment in large), default=0)
    tiles = [segment for segment in large if 2 * segment.bundles >= longest]
    ends = sum(segment.bundles for segment in large if segment not in tiles) if depth == 1 else 0
    variants = [segment.bundles for segment in tiles]
    own = {n: sum(segment.bundles for segment in segments if segment.depth == n) for n in (1, 2, 3)}
    visit = own[2] - sum(variants) if depth == 2 else 0
    step = own[1] - (sum(variants) + ends if depth == 1 else 0)
    first, last = (variants[0], variants[-1]) if variants else (0, 0)
    skipped = [s.bundles for s in segments if s.depth == 1 and s.bundles >= LARGE_SEGMENT] if skips_steps else [0]
    return KernelSchedule(step - sum(skipped), visit + first, visit + last, own[3], ends, sum(skipped[1:]))


def _segments(text: str) -> Iterator[_Segment]:
    depth, size, conditional, branched = 0, 0, False, False
    for match in map(_BUNDLE.match, text.splitlines()):
        if match is None:
            continue
        label, content = match[1], match[3]
        empty = content.strip().startswith("}")  # such a bundle is printed without its depth
        new_depth = depth if empty else len(match[2])
        if label or branched or new_depth != depth:
            if size:
                yield _Segment(depth, conditional, size)
            size, conditional = 0, branched and not label
        depth, size, branched = new_depth, size + 1, "sbr.rel (" in content
    if size:
        yield _Segment(depth, conditional, size)
