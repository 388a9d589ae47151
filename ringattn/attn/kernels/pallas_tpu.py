"""A fused kernel for TPUs, in Pallas. Visits and fetches only the tiles with a visible key.

`tpu_forward` and `tpu_backward` are the two kernels, `tpu_tiles` what they share. On other devices they run in the
interpreter for TPU kernels, which simulates memory and transfers; it is slow, and meant for tests.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ringattn.attn.kernels import tpu_backward, tpu_forward
from ringattn.attn.kernels.protocol import KV, KVGrads, LogitSpec, Queries, QueryGrads, Residuals, Slopes
from ringattn.attn.kernels.tiles import largest_divisor, pad, pad_to_tiles, tile_sizes
from ringattn.attn.kernels.tpu_tiles import Options
from ringattn.attn.softmax import Partial


@dataclass(frozen=True)
class PallasTpu:
    """The kernel for TPUs.

    Attributes:
      tile: maximum number of queries and of keys in a tile of the forward pass.
      multiple: sizes of tiles are multiples of it; 128 on a TPU.
      interpret: True to run in the interpreter.
      backward_tile: as `tile`, for the backward pass. Default: the same.
      heads: maximum number of query heads in a grid step, which fetches a tile of keys for all of them.
    """

    tile: tuple[int, int]
    multiple: int = 128
    interpret: bool = False
    backward_tile: tuple[int, int] | None = None
    heads: int = 8

    def forward(
        self,
        spec: LogitSpec,
        queries: Queries,
        kv: KV,
        slopes: Slopes | None,
        carry: Partial | None,
        dtype: DTypeLike | None = None,
    ) -> Partial:
        """See `protocol.Kernel.forward`."""
        shape, groups = (*queries.query.shape[:-1], kv.value.shape[-1]), self._groups(queries.query)
        queries, kv = pad_to_tiles(queries, kv, self.tile, self.multiple)
        carry = jax.tree.map(lambda x: _regroup(pad(x, 3, queries.query.shape[3]), groups), carry)
        sizes = tile_sizes(queries.query.shape[3], kv.key.shape[2], self.tile, self.multiple)
        queries = queries._replace(query=_regroup(queries.query, groups))
        options = Options(sizes, dtype or jnp.float32, self.interpret)
        part = tpu_forward.forward(spec, queries, kv, slopes, carry, options)
        out, lse = (x[:, :, :, : shape[3]].reshape(shape[: x.ndim]) for x in part)
        return Partial(out, lse)

    def backward(
        self,
        spec: LogitSpec,
        queries: Queries,
        kv: KV,
        slopes: Slopes | None,
        residuals: Residuals,
        carry: QueryGrads | None,
        dtype: DTypeLike | None = None,
    ) -> tuple[QueryGrads, KVGrads]:
        """See `protocol.Kernel.backward`."""
        shape, groups, tile = queries.query.shape, self._groups(queries.query), self.backward_tile or self.tile
        kv_length = kv.key.shape[2]
        queries, kv = pad_to_tiles(queries, kv, tile, self.multiple)
        residuals, query_carry = jax.tree.map(
            lambda x: _regroup(pad(x, 3, queries.query.shape[3]), groups), (residuals, carry and carry.query)
        )
        sizes = tile_sizes(queries.query.shape[3], kv.key.shape[2], tile, self.multiple)
        queries = queries._replace(query=_regroup(queries.query, groups))
        d_query, d_slopes, kv_grads = tpu_backward.backward(
            spec, queries, kv, slopes, residuals, query_carry, Options(sizes, dtype or jnp.float32, self.interpret)
        )
        if slopes is not None and d_slopes is not None:
            d_slopes = d_slopes.reshape(slopes.shape)
            d_slopes = d_slopes if carry is None or carry.slopes is None else carry.slopes + d_slopes
        d_query = d_query[:, :, :, : shape[3]].reshape(shape)
        return QueryGrads(d_query, d_slopes), KVGrads(*(x[:, :, :kv_length] for x in kv_grads))

    def groups(self, heads: int, kv_heads: int) -> int:
        """Returns the number of groups of query heads, of one grid step each; a K/V head may have several."""
        return heads // largest_divisor(heads // kv_heads, self.heads)

    def _groups(self, query: Float[Array, "B G R L D"]) -> int:
        _, kv_heads, shared, *_ = query.shape
        return self.groups(kv_heads * shared, kv_heads)


def _regroup(x: Float[Array, "B G R ..."], groups: int) -> Float[Array, "B {groups} _ ..."]:
    return x.reshape(x.shape[0], groups, -1, *x.shape[3:])
