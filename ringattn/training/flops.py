"""Useful FLOPs: what a step has to compute, however it does, for the share of the devices' peak that is reached."""

import jax
import numpy as np

from ringattn import config
from ringattn.data import Batch
from ringattn.hardware import CHIPS


def step_flops(c: config.Config, vocabulary: int, batch: Batch) -> int:
    """Useful FLOPs of an update with `batch` [B, L], forward and backward, over all devices.

    For each token 6 a weight of a matrix product; for each pair of tokens of which one sees the other, 12 a layer and
    number of its query heads. What is computed twice to save memory, what a mask excludes, padding, norms and the
    optimizer do not count. `vocabulary` are the ids, unless the model is to have more.
    """
    vocabulary = c.model.vocabulary or vocabulary
    tokens = int(np.count_nonzero(batch.segment_ids >= 0))
    pairs = visible_pairs(batch.positions, batch.segment_ids, c.attention.window)
    return (
        6 * product_weights(c.model, vocabulary) * tokens
        + 12 * c.model.layers * c.model.heads * c.model.head_dim * pairs
    )


def product_weights(c: config.Model, vocabulary: int) -> int:
    """Weights that a token is multiplied with: the layers' matrices and the output's; a look-up is no product."""
    attention = 2 * (c.heads + c.kv_heads) * c.head_dim
    return c.layers * c.dim * (attention + 3 * c.feed_forward) + vocabulary * c.dim


def visible_pairs(positions: np.ndarray, segment_ids: np.ndarray, window: int | None) -> int:
    """Pairs (query, key) that see each other under a causal mask, in rows [B, L] of documents each whole in its row.

    A token sees itself and all before it in its document, at most `window` of them. Padding, of a negative segment,
    sees and is seen by nothing.
    """
    before = positions if window is None else np.minimum(positions, window)
    return int(np.sum(before + 1, where=segment_ids >= 0, dtype=np.int64))


def peak_flops() -> float | None:
    """FLOP/s of all devices together, in bfloat16; None where it is not known."""
    chip = CHIPS.get(jax.devices()[0].device_kind)
    return None if chip is None else chip.flops * jax.device_count()
