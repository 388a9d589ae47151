"""Per-token losses and argmax predictions, for validation and evaluation."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import P, lax
from jaxtyping import Array, Float, Int

from ringattn.data import Batch
from ringattn.data.placement import place_batch, read_rows
from ringattn.model.build import MakeModel, make_forward
from ringattn.model.loss import token_scores
from ringattn.model.parallel import Params

MAX_PENDING = 2
"""Number of batches that are dispatched before the first result is read."""


class Scores(NamedTuple):
    """Scores of a batch [B, L], with tokens in natural order; equal in all processes."""

    nats: Float[np.ndarray, "B L"]
    """float32: -log p(target)."""
    predictions: Int[np.ndarray, "B L"]
    """int32: the argmax prediction of each target; the lowest id on ties."""


@dataclass(frozen=True)
class Scorer:
    """Scores batches on a mesh. Call it under `jax.set_mesh(mesh)`."""

    mesh: jax.sharding.Mesh
    layout: str
    microbatches: int
    """Number of microbatches per batch, computed sequentially."""
    step: Callable[[Params, Batch], tuple[Float[Array, "A B L"], Int[Array, "A B L"]]]

    def __call__(self, params: Params, batches: Iterable[Batch]) -> Iterator[Scores]:
        """Yields the scores of each batch [B, L]. B must be a multiple of `microbatches` times the data axis size."""
        pending: deque[tuple[Array, Array]] = deque()
        try:
            for batch in batches:
                pending.append(self.step(params, place_batch(batch, self.mesh, self.layout, self.microbatches)))
                if len(pending) > MAX_PENDING:
                    yield self._read(pending.popleft())
            while pending:
                yield self._read(pending.popleft())
        finally:  # if the caller stops early: on CPU, programs of several processes must not run at the same time
            jax.block_until_ready(list(pending))

    def _read(self, results: tuple[Array, Array]) -> Scores:
        return Scores(*(read_rows(x, self.mesh, self.layout) for x in results))


def make_scorer(
    make_model: MakeModel, vocabulary: int, mesh: jax.sharding.Mesh, layout: str, microbatches: int = 1
) -> Scorer:
    """Returns a scorer on `mesh` for a model whose sequences are in `layout` order.

    The results are replicated and take 8 bytes per token on each device.
    """
    forward = make_forward(make_model)

    @jax.jit
    def step(params: Params, batch: Batch):
        def scores(microbatch: Batch):
            hidden, output, soft_cap = forward(params, microbatch)
            return token_scores(hidden, output, jnp.asarray(microbatch.targets), vocabulary, soft_cap)

        return jax.reshard(lax.map(scores, batch), P(None, None, None))

    return Scorer(mesh, layout, microbatches, step)
