"""Numbers behind the pictures: who holds what at which hop, what is seen there, how much work it is.

All of it is asked of `ringattn.layout` and `ringattn.attention`, the code that trains; nothing is derived anew.
"""

from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Int

from ringattn.attention.mask import Mask, Tokens, needed_hops, visible
from ringattn.attention.ring import plan_hops
from ringattn.layout import check_length, order


@dataclass(frozen=True, eq=False)
class Row:
    """A row of tokens on a ring, and who may see whom in it.

    Attributes:
      length: tokens of the row.
      shards: devices on the ring.
      layout: how the tokens lie over them.
      mask: by positions, as of `ringattn.attention`.
      segment_ids, span_ids: int32 [length] in natural order, as of `ringattn.attention`, or None.
      tile: tokens of a kernel's tile to each side, which is computed if anything in it is seen; 1 counts single pairs.

    Raises ValueError if the length does not fit the layout, the ids not the length, or the tile not a shard.
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
                raise ValueError(f"{name} {ids.shape} must be ({self.length},), an id for every token of the row")
        if self.tile < 1 or self.local % self.tile:
            raise ValueError(f"tile={self.tile} must divide a device's {self.local} tokens: use 1, or {self.local}")

    @property
    def local(self) -> int:
        """Tokens that a device holds."""
        return self.length // self.shards


def visitors(devices: int) -> list[list[int]]:
    """[device][hop]: whose K/V shard a device holds at hop 0 (its own), 1, ..., devices - 1."""
    return [[(device - hop) % devices for hop in range(devices)] for device in range(devices)]


def owners(devices: int, layout: str) -> list[int]:
    """The device that holds each of 2 * devices tokens, by position: the finest sequence that every layout takes."""
    held = order(layout, 2 * devices, devices).reshape(devices, 2).tolist()
    owner = {position: device for device, positions in enumerate(held) for position in positions}
    return [owner[position] for position in range(2 * devices)]


def seen(row: Row) -> Bool[np.ndarray, "L L"]:
    """May query i see key j, both counted as the tokens lie on the ring."""
    places = order(row.layout, row.length, row.shards)
    segments, spans = (None if ids is None else ids[places][None] for ids in (row.segment_ids, row.span_ids))
    tokens = Tokens(places[None], segments, spans)
    return np.asarray(visible(row.mask, tokens, tokens))[0]


def pairs(row: Row) -> Int[np.ndarray, "devices hops"]:
    """Pairs of a query and a key it sees: the work of each device with the shard from each number of hops away.

    Hop h is that of the K/V from h devices back, whichever way they come. Of a tile all pairs count, or none.
    """
    tiles, local = row.length // row.tile, row.local // row.tile
    met = seen(row).reshape(tiles, row.tile, tiles, row.tile).any((1, 3))
    met = row.tile**2 * met.reshape(row.shards, local, row.shards, local).sum((1, 3))
    return np.stack([met[device, homes] for device, homes in enumerate(visitors(row.shards))])


def hops_made(row: Row) -> tuple[int, ...]:
    """The hops 0 < h < shards for which the ring sends K/V; the others vanish. It asks positions, not segments."""
    # A span lets its tokens see ahead, wherever it lies.
    mask = replace(row.mask, causal=row.mask.causal and row.span_ids is None)
    needed = needed_hops(mask, row.layout, row.shards, row.local, row.local)
    runs = plan_hops(needed, row.shards)
    return tuple(sorted(step * hop % row.shards for step, hops in runs for hop in range(1, hops + 1)))


def full_hops(row: Row) -> tuple[float, float]:
    """(time, mean): what the ring computes, in hops of a device in which every query sees every key.

    `time` sums the most that a device has to do at every hop, as if all waited for it; since neighbours may be a hop
    apart, it is a bound from above. `mean` sums what they do on average: the time if work were even.
    """
    work = pairs(row) / row.local**2
    return float(work.max(0).sum()), float(work.mean(0).sum())


def imbalance(row: Row) -> float:
    """max/mean: by how much the ring takes longer than if all devices did equally much at every hop; 1 is balanced."""
    time, mean = full_hops(row)
    return time / mean
