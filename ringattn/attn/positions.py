"""Positions that the layout implies, so that they need not be sent."""

from dataclasses import dataclass, replace
from typing import Literal

from jaxtyping import Array, Int

from ringattn.attn.mask import Runs, Tokens
from ringattn.layout import pieces, positions_of

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

    def q_tokens(self, first: Index, count: int) -> Tokens:
        """Returns queries [1, count * local_queries]: `count` consecutive shards from index `first` on."""
        return self._tokens(first, count, self.local_queries, self.shards * (self.local_keys - self.local_queries))

    def kv_tokens(self, first: Index, count: int) -> Tokens:
        """Returns keys [1, count * local_keys]: `count` consecutive shards from index `first` on."""
        return self._tokens(first, count, self.local_keys, 0)

    def local_tokens(self, first: Index, count: int) -> tuple[Tokens, Tokens]:
        """Returns the queries and the keys of the same `count` consecutive shards."""
        return self.q_tokens(first, count), self._related(self.kv_tokens(first, count), "local")

    def all_keys(self) -> Tokens:
        """Returns the keys of all shards."""
        return self._related(self.kv_tokens(0, self.shards), "all")

    def _related(self, keys: Tokens, relation: Literal["local", "all"]) -> Tokens:
        if self.local_queries != self.local_keys:
            return keys
        assert keys.runs is not None
        return keys._replace(runs=replace(keys.runs, keys=relation))

    def _tokens(self, first: Index, count: int, local: int, offset: int) -> Tokens:
        piece = pieces(self.layout, 0, self.shards, local)[0]  # all pieces of a layout have the same step and count
        positions = positions_of(self.layout, first, count, self.shards, local)[None] + offset
        consecutive_shards = count if self.layout == "contiguous" else 1
        return Tokens(positions, runs=Runs(piece.count * consecutive_shards, piece.step))
