"""All-gather of K/V, then one kernel call.

Memory grows with the number of devices; latency is that of one collective.
"""

from dataclasses import dataclass

from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ringattn.attn.kernels.protocol import KV, Kernel, KVGrads, LogitSpec, Queries, QueryGrads, Residuals, Slopes
from ringattn.attn.mask import Ids, Tokens
from ringattn.attn.positions import ImpliedPositions
from ringattn.attn.softmax import Partial


@dataclass(frozen=True)
class Gather:
    """Gathers the K/V of all devices of a mesh axis (or pair of axes), and computes the local queries' attention.

    Attributes:
      axis: the mesh axis, or axes, over which the sequence is sharded.
      kernel: computes the local queries against the gathered K/V.
      implied: positions, if the layout implies them; None: positions are given, and gathered with K/V.
      reduce_dtype: dtype in which K/V gradients are reduced over the devices; None: the dtype of the kernel's results.
    """

    axis: str | tuple[str, str]
    kernel: Kernel
    implied: ImpliedPositions | None
    reduce_dtype: str | None = None

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
        return self.kernel.forward(spec, queries, self._gather(kv), slopes, carry, dtype)

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
        """See `protocol.Kernel.backward`. Gathers K/V again, so that the forward pass need not keep them."""
        query_grads, kv_grads = self.kernel.backward(spec, queries, self._gather(kv), slopes, residuals, carry, dtype)
        return query_grads, KVGrads(*map(self._reduce_scatter, kv_grads))

    def _reduce_scatter(self, x: Float[Array, "B G M D"]) -> Float[Array, "B G local_M D"]:
        sent = x.astype(self.reduce_dtype or x.dtype)
        return lax.psum_scatter(sent, self.axis, scatter_dimension=2, tiled=True).astype(x.dtype)

    def _gather(self, kv: KV) -> KV:
        implied = None if self.implied is None else self.implied.all_keys()
        tokens = gather_tokens(kv.tokens, self.axis, implied)
        key, value = (lax.all_gather(x, self.axis, axis=2, tiled=True) for x in (kv.key, kv.value))
        return KV(key, value, tokens)


def gather_tokens(tokens: Tokens, axis: str | tuple[str, str], implied: Tokens | None) -> Tokens:
    """Returns all tokens held by the devices of `axis`. Gathers positions only if the layout does not imply them."""

    def gather(ids: Ids | None) -> Array | None:
        return None if ids is None else lax.all_gather(ids, axis, axis=1, tiled=True)

    all_tokens = Tokens(lax.all_gather(tokens.positions, axis, axis=1, tiled=True)) if implied is None else implied
    return all_tokens._replace(segments=gather(tokens.segments), spans=gather(tokens.spans))
