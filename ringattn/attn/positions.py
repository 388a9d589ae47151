"""Positions that the layout implies, so that they need not be sent."""

from dataclasses import dataclass

from jaxtyping import Array, Int

from ringattn.layout import positions_of

Index = int | Int[Array, ""]


@dataclass(frozen=True)
class ImpliedPositions:
    """Positions of a sequence whose tokens are stored in `layout`.

    Attributes:
      layout: "contiguous", "striped" or "zigzag".
      shards: number of shards of the sequence.
      local_queries, local_keys: tokens per shard. The queries are the last tokens of the sequence.
    """

    layout: str
    shards: int
    local_queries: int
    local_keys: int

    def q_positions(self, first: Index, count: int) -> Int[Array, "1 {count*self.local_queries}"]:
        """Returns the positions of the queries in the `count` consecutive shards that start at index `first`."""
        offset = self.shards * (self.local_keys - self.local_queries)
        return positions_of(self.layout, first, count, self.shards, self.local_queries)[None] + offset

    def kv_positions(self, first: Index, count: int) -> Int[Array, "1 {count*self.local_keys}"]:
        """Returns the positions of the keys in the `count` consecutive shards that start at index `first`."""
        return positions_of(self.layout, first, count, self.shards, self.local_keys)[None]
