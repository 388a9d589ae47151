"""Numbers behind the figures: owners of K/V shards by hop, visible pairs, compute per device and hop.

Everything is computed with `ringattn.layout` and `ringattn.attn`, as in training.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int

from ringattn.attn.hops import hop_runs
from ringattn.attn.mask import Mask, Tokens, visible
from ringattn.attn.positions import ImpliedPositions
from ringattn.layout import check_length, order


@dataclass(frozen=True, eq=False)
class Row:
    """A row of tokens that is sharded over a ring, and its mask.

    Attributes:
      length: tokens of the row.
      shards: devices of the ring.
      layout: order of the tokens over the shards.
      mask: as in `ringattn.attention`.
      segment_ids, span_ids: int32 [length] in natural order, or None; as in `ringattn.attention`.
      tile: side of a kernel's tiles in tokens. All pairs of a tile count as computed if any is visible; 1 counts
        only the visible pairs.

    Raises ValueError if the length does not fit the layout, the ids do not have this length, or the tile does not
    divide a shard.
    """

    length: int
    shards: int
    layout: str = "contiguous"
    mask: Mask = Mask()
    segment_ids: np.ndarray | None = None
    span_ids: np.ndarray | None = None
    tile: int = 1

    def __post_init__(self):
        check_length(self.length, self.layout, self.shards)
        for name in ("segment_ids", "span_ids"):
            ids = vars(self)[name]
            if ids is not None and ids.shape != (self.length,):
                raise ValueError(f"{name}.shape={ids.shape} must be ({self.length},), one id per token of the row")
        if self.tile < 1 or self.local % self.tile:
            raise ValueError(f"tile={self.tile} must divide the {self.local} tokens per device; use 1 or {self.local}")

    @property
    def local(self) -> int:
        """Tokens per device."""
        return self.length // self.shards


def kv_owners(devices: int) -> list[list[int]]:
    """Owners of the K/V shards that each device computes with, as [device][hop]; hop 0 is the local shard."""
    return [[(device - hop) % devices for hop in range(devices)] for device in range(devices)]


def token_owners(devices: int, layout: str) -> list[int]:
    """Owners of 2 * devices tokens, by position. Every layout accepts that length."""
    held = order(layout, 2 * devices, devices).reshape(devices, 2).tolist()
    owner = {position: device for device, positions in enumerate(held) for position in positions}
    return [owner[position] for position in range(2 * devices)]


def dense_mask(row: Row) -> Bool[np.ndarray, "L L"]:
    """Visibility of each (query, key) pair, both in the order in which the ring stores the tokens."""
    positions = order(row.layout, row.length, row.shards)
    segments, spans = (None if ids is None else ids[positions][None] for ids in (row.segment_ids, row.span_ids))
    tokens = Tokens(positions[None], segments, spans)
    return np.asarray(visible(row.mask, tokens, tokens))[0]


def pairs_per_hop(row: Row) -> Int[np.ndarray, "devices hops"]:
    """(query, key) pairs that each device computes at each hop.

    Hop h uses the K/V shard of the device h places back on the ring, in whichever direction the ring sends it.
    """
    tiles, local_tiles = row.length // row.tile, row.local // row.tile
    computed = dense_mask(row).reshape(tiles, row.tile, tiles, row.tile).any((1, 3))
    by_shard = row.tile**2 * computed.reshape(row.shards, local_tiles, row.shards, local_tiles).sum((1, 3))
    return np.stack([by_shard[device, owners] for device, owners in enumerate(kv_owners(row.shards))])


def sent_hops(row: Row) -> tuple[int, ...]:
    """Hops h > 0 for which the ring sends K/V. They depend on positions, not on segments; the ring skips the others."""
    implied = ImpliedPositions(row.layout, row.shards, row.local, row.local)
    runs = hop_runs(row.mask, row.span_ids is not None, implied, row.shards)
    return tuple(sorted(step * hop % row.shards for step, hops in runs for hop in range(1, hops + 1)))


def compute_time(row: Row) -> tuple[float, float]:
    """Returns (time, balanced_time) of a pass, in hops of a device that computes every pair.

    `time` sums the largest amount of work per hop, as if all devices waited for the slowest at every hop. It is an
    upper bound, because neighbours may be one hop apart. `balanced_time` sums the mean over devices instead.
    """
    work = pairs_per_hop(row) / row.local**2
    return float(work.max(0).sum()), float(work.mean(0).sum())


def imbalance(row: Row) -> float:
    """max/mean of the work: `time / balanced_time` of `compute_time`. 1 is balanced."""
    time, balanced_time = compute_time(row)
    return time / balanced_time
