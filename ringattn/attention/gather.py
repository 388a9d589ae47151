"""All-gather of K/V, then one local call: memory grows with the ring, but one transfer may beat many short hops."""

from dataclasses import dataclass
from typing import Any

import jax
from jax import lax

from ringattn.attention.kernels import Keys, OfKeys, OfQueries, Queries, Rule, Saved
from ringattn.attention.mask import Tokens
from ringattn.attention.softmax import Partial
from ringattn.layout import positions_of


@dataclass(frozen=True)
class Gather:
    """Every device gathers all keys over mesh axis (or axes) `axis` and computes its own queries' attention.

    Attributes:
      layout: how the sequence lies, so that positions need not be sent; None where they are the caller's own.
      reduce_dtype: the dtype in which gradients of K/V are summed over the devices; None: that in which they are made.
    """

    axis: str | tuple[str, str]
    layout: str | None
    kernel: Any
    reduce_dtype: str | None = None

    def forward(self, rule: Rule, queries: Queries, keys: Keys, slopes: Any, before: Partial) -> Partial:
        """Attention of this device's queries to the keys of all devices; as a kernel's `forward`."""
        return self.kernel.forward(rule, queries, self._gathered(keys), slopes, before)

    def backward(
        self, rule: Rule, queries: Queries, keys: Keys, slopes: Any, saved: Saved, before: OfQueries
    ) -> tuple[OfQueries, OfKeys]:
        """Gradients of this device's queries and keys; as a kernel's `backward`. Gathers again: nothing is kept."""
        of_queries, of_keys = self.kernel.backward(rule, queries, self._gathered(keys), slopes, saved, before)
        return of_queries, OfKeys(*map(self._scattered, of_keys))

    def _scattered(self, x: Any) -> Any:
        sent = x.astype(self.reduce_dtype or x.dtype)
        return lax.psum_scatter(sent, self.axis, scatter_dimension=2, tiled=True).astype(x.dtype)

    def _gathered(self, keys: Keys) -> Keys:
        def whole(x, dim):
            return lax.all_gather(x, self.axis, axis=dim, tiled=True)

        shards, local = lax.axis_size(self.axis), keys.key.shape[2]
        positions = None if self.layout is None else positions_of(self.layout, 0, shards, shards, local)[None]
        tokens = gather_tokens(keys.tokens, self.axis, positions)
        return Keys(whole(keys.key, 2), whole(keys.value, 2), tokens)


def gather_tokens(tokens: Tokens, axis: Any, positions: Any) -> Tokens:
    """The tokens of all devices of `axis`; their positions, where these are known, need not be sent."""
    sent = tokens if positions is None else tokens._replace(positions=None)
    whole = jax.tree.map(lambda x: lax.all_gather(x, axis, axis=1, tiled=True), sent)
    return whole if positions is None else whole._replace(positions=positions)
