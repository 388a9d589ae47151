"""Log-probabilities of the tokens of rows, chunk by chunk while they are prefilled."""

from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Float, Int

from ringattn.generation.rows import Done, Rows
from ringattn.layout import permute, unpermute
from ringattn.mesh.axes import TOKENS, place


def score_rows(
    batch: Rows, rows: Sequence[np.ndarray]
) -> list[tuple[Float[np.ndarray, " tokens"], Int[np.ndarray, " tokens"]]]:
    """Extends `batch` by `rows`. Returns -log p of each token (in nats; 0 for the first), and the most likely token."""
    found = [(np.zeros(row.size, np.float32), np.zeros(row.size, np.int32)) for row in rows]

    def read(done: Done, hidden: jax.Array) -> None:
        for number, scores in enumerate(_score_chunk(batch, rows, done, hidden)):
            start, first = int(done.begin[number]), int(done.first[number])
            count = max(min(int(done.end[number]) + 1, rows[number].size) - (start + 1), 0)
            for values, new in zip(found[number], scores, strict=True):  # a token predicts the next one
                values[start + 1 : start + 1 + count] = new[start - first :][:count]

    batch.extend(rows, on_chunk=read)
    return found


def _score_chunk(
    batch: Rows, rows: Sequence[np.ndarray], done: Done, hidden: jax.Array
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns -log p(target) and the most likely token for each token of a chunk, per row and in natural order."""
    engine = batch.engine
    targets = np.zeros((batch.padded, done.length), np.int32)
    for number, row in enumerate(rows):
        first = int(done.first[number])
        part = row[first + 1 : first + 1 + done.length]
        targets[number, : part.size] = part
    placed = place(permute(targets, "striped", engine.shards), engine.mesh, TOKENS)
    found = engine.programs.score(engine.params, hidden, placed)
    nats, likely = (unpermute(np.asarray(x), "striped", engine.shards) for x in found)
    return list(zip(nats, likely, strict=True))[: len(rows)]
