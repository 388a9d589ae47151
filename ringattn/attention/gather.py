"""All-gather of K/V, then one local call: memory grows with the ring, but one transfer may beat many short hops."""

from dataclasses import dataclass
from typing import Any

import jax
from jax import lax

from ringattn.attention.kernels import Keys, OfKeys, OfQueries, Queries, Rule, Saved
from ringattn.attention.softmax import Partial


@dataclass(frozen=True)
class Gather:
    """Every device gathers all keys over mesh axis (or axes) `axis` and computes its own queries' attention.

    Gradients of K/V are summed over the devices in `reduce_dtype`; None: the dtype in which they are made.
    """

    axis: str | tuple[str, str]
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

        tokens = jax.tree.map(lambda x: whole(x, 1), keys.tokens)
        return Keys(whole(keys.key, 2), whole(keys.value, 2), tokens)
