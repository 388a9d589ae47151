"""Numbers of tiles that an attention kernel visits: from the mask and the positions, as the kernel itself decides."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import jax
import numpy as np

from ringattn.attn.hops import hop_runs
from ringattn.attn.kernels.tiles import relate_tiles, tile_bounds, tile_sizes
from ringattn.attn.mask import Mask, Tokens
from ringattn.attn.positions import ImpliedPositions
from ringattn.cost.cycles import TileCounts
from ringattn.cost.program import KernelCall


class Ring(NamedTuple):
    """Attention of one row that is sharded over a ring.

    Attributes:
      documents: number of equally long documents packed into the row.
    """

    mask: Mask
    layout: str
    members: int
    local: int
    """Tokens per member."""
    documents: int = 1

    @property
    def implied(self) -> ImpliedPositions:
        return ImpliedPositions(self.layout, self.members, self.local, self.local)

    def tokens(self, member: int) -> Tokens:
        """Returns the tokens of a member's shard."""
        tokens = self.implied.kv_tokens(member, 1)
        if self.documents == 1:
            return tokens
        positions, length = np.asarray(tokens.positions, np.int64), self.members * self.local
        return tokens._replace(segments=(positions * self.documents // length).astype(np.int32))

    @property
    def hops(self) -> tuple[tuple[int, int], ...]:
        """The runs of hops, as (direction, hops)."""
        return hop_runs(self.mask, False, self.implied, self.members)

    def owners(self, member: int) -> Iterator[int]:
        """Yields the owners of the K/V shards that a member attends to, the local shard first."""
        yield member
        for direction, hops in self.hops:
            yield from ((member - direction * (hop + 1)) % self.members for hop in range(hops))


class Tiling(NamedTuple):
    """Tile sizes and groups of heads of a kernel.

    Attributes:
      tile: maximum number of queries and of keys in a tile.
      multiple: sizes of tiles are multiples of it.
      groups: number of groups of heads, each with its own tiles.
    """

    tile: tuple[int, int]
    multiple: int = 1
    groups: int = 1

    def sizes(self, queries: int, keys: int) -> tuple[int, int]:
        """Returns the tile sizes of a call with these numbers of queries and keys."""
        return tile_sizes(queries, keys, self.tile, self.multiple)


def count_tiles(mask: Mask, q: Tokens, kv: Tokens, sizes: tuple[int, int], groups: int, by_keys: bool) -> TileCounts:
    """Returns the counts of one call, for tiles of `sizes` (queries, keys) and `groups` K/V heads.

    A grid step has one tile of queries; with `by_keys`, as in the backward kernel, one tile of keys.
    """
    q_bounds, kv_bounds = (tile_bounds(x, size) for x, size in zip((q, kv), sizes, strict=True))
    empty, full = relate_tiles(mask, q_bounds, kv_bounds)
    visible, full = np.any(~np.asarray(empty), 0), np.all(np.asarray(full), 0)
    rows = visible.T if by_keys else visible
    last = np.where(rows.any(1), rows.shape[1] - np.argmax(rows[:, ::-1], 1), 0)
    first = np.where(rows.any(1), np.argmax(rows, 1), 0)
    visited, unmasked = int(visible.sum()), int((visible & full).sum())
    searched = int((last - first).sum()) - visited
    idle = 0 if by_keys else int((~rows.any(1)).sum())
    return TileCounts(*(groups * n for n in (len(rows), unmasked, visited - unmasked, searched, idle)))


def ring_counts(ring: Ring, tilings: Mapping[str, Tiling]) -> dict[KernelCall, TileCounts]:
    """Returns the mean counts per call of the forward and the backward kernel, over all members and hops of a ring.

    `tilings` has those of "ringattn_forward" and "ringattn_backward". The backward pass attends to each half of the
    local keys separately.
    """
    calls: dict[KernelCall, list[TileCounts]] = {}
    cached: dict[tuple[str, bytes, bytes], TileCounts] = {}

    def count(name: str, q: Tokens, kv: Tokens) -> None:
        q_ids, kv_ids = (b"".join(np.asarray(x).tobytes() for x in side[:2] if x is not None) for side in (q, kv))
        lengths, tiling = (q.positions.shape[1], kv.positions.shape[1]), tilings[name]
        if (name, q_ids, kv_ids) not in cached:
            by_keys = name == "ringattn_backward"
            counts = count_tiles(ring.mask, q, kv, tiling.sizes(*lengths), tiling.groups, by_keys)
            cached[name, q_ids, kv_ids] = counts
        calls.setdefault(KernelCall(name, *lengths), []).append(cached[name, q_ids, kv_ids])

    # All members of a causal zigzag ring do the same work.
    equal = ring.layout == "zigzag" and ring.documents == 1 and ring.mask == Mask()
    for member in range(1 if equal else ring.members):
        q = ring.tokens(member)
        for hop, owner in enumerate(ring.owners(member)):
            kv, half = ring.tokens(owner)._replace(runs=None), ring.local // 2
            count("ringattn_forward", q, kv)
            halves = [(0, half), (half, ring.local)]
            for start, stop in halves if hop == 0 and ring.hops else [(0, ring.local)]:
                count("ringattn_backward", q, jax.tree.map(lambda x, at=slice(start, stop): x[:, at], kv))
    means = {call: np.mean(counts, axis=0).tolist() for call, counts in calls.items()}
    return {call: TileCounts(*mean) for call, mean in means.items()}
