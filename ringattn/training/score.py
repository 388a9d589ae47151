"""What a model makes of given tokens: every token's loss, and what it would have said instead.

Validation within a run and evaluation after it are both made of this.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import P, lax
from jaxtyping import Array, Float, Int

from ringattn import permute, unpermute
from ringattn.data import Batch
from ringattn.mesh import TOKENS, place, shards
from ringattn.model import Params
from ringattn.training.loss import token_scores
from ringattn.training.step import MakeModel, make_forward

_AHEAD = 2  # batches that are on their way before the first is read


class Scores(NamedTuple):
    """Of a batch [B, L], tokens in order, the same in every process."""

    nats: Float[np.ndarray, "B L"]
    """float32: -log p(target)."""
    best: Int[np.ndarray, "B L"]
    """int32: the likeliest id in each target's place; of equally likely ones the lowest."""


@dataclass(frozen=True)
class Scorer:
    """Scores batches on a mesh; to be called under `jax.set_mesh(mesh)`."""

    mesh: jax.sharding.Mesh
    layout: str
    parts: int
    """A batch is computed in so many parts, one after another."""
    step: Callable[[Params, Batch], tuple[Float[Array, "A B L"], Int[Array, "A B L"]]]

    def __call__(self, params: Params, batches: Iterable[Batch]) -> Iterator[Scores]:
        """The scores of each batch [B, L], B a multiple of `parts` times the data axis."""
        pending: deque[tuple[Array, Array]] = deque()
        for batch in batches:
            pending.append(self.step(params, on_devices(batch, self.mesh, self.layout, self.parts)))
            if len(pending) > _AHEAD:
                yield self._read(pending.popleft())
        while pending:
            yield self._read(pending.popleft())

    def _read(self, found: tuple[Array, Array]) -> Scores:
        rows = (x.reshape(-1, x.shape[-1]) for x in map(np.asarray, jax.device_get(found)))
        return Scores(*(unpermute(x, self.layout, shards(self.mesh)) for x in rows))


def make_scorer(make_model: MakeModel, vocabulary: int, mesh: jax.sharding.Mesh, layout: str, parts: int = 1) -> Scorer:
    """`make_model` makes a model for rows in the order of `layout`, on `mesh`, under which this is called.

    Each device holds the results whole: 8 bytes a token.
    """
    forward = make_forward(make_model)

    @jax.jit
    def step(params: Params, batch: Batch):
        def scores(part: Batch):
            return token_scores(*forward(params, part), jnp.asarray(part.targets), vocabulary)

        return jax.reshard(lax.map(scores, batch), P(None, None, None))

    return Scorer(mesh, layout, parts, step)


def on_devices(batch: Batch, mesh: jax.sharding.Mesh, layout: str, parts: int) -> Batch:
    """A host's batch [B, L] in the layout's order, as arrays [parts, B / parts, L] spread over the mesh."""
    laid = jax.tree.map(lambda x: permute(x, layout, shards(mesh)).reshape(parts, -1, x.shape[1]), batch)
    return place(laid, mesh, P(None, *TOKENS))
