"""Model FLOPs (as in MFU): without recomputation and without masked pairs."""

import jax
import numpy as np

from ringattn import config
from ringattn.data import Batch
from ringattn.hardware import CHIPS
from ringattn.model.families import layer_kinds, layer_mask

RECOMPUTED = {"off": (0, 0), "on": (1, 0), "offload": (1, 0), "offload_inputs": (1, 1), "offload_groups": (2, 1)}
"""Forward passes computed again by each `model.remat`: of all but attention, and of attention."""


def step_flops(c: config.Config, vocabulary: int, batch: Batch) -> int:
    """Returns the model FLOPs of one update with `batch` [B, L], forward and backward, over all devices.

    6 FLOPs per token and matrix weight, and 12 per unmasked pair, layer, query head and head dimension (PaLM, arXiv
    2204.02311, appendix B, with unmasked pairs instead of L^2). Recomputation, masked pairs, padding, norms and the
    optimizer are not counted. `vocabulary` is the tokenizer's vocabulary size, used unless `model.vocabulary` is set.
    """
    vocabulary = c.model.vocabulary or vocabulary
    tokens = int(np.count_nonzero(_unpadded(batch.positions, batch.segment_ids)))
    pairs = 0
    for kind, layers in layer_kinds(c.model).items():
        window = layer_mask(c.model, kind).left
        pairs += layers * visible_pairs(batch.positions, batch.segment_ids, window)
    return _flops(c.model, vocabulary, tokens, pairs)


def useful_step_flops(c: config.Config) -> int:
    """Returns `step_flops` of an update of `c` whose rows have one document each. `model.vocabulary` must be set."""
    length, pairs = c.data.seq_len, 0
    for kind, layers in layer_kinds(c.model).items():
        pairs += layers * document_pairs(length, layer_mask(c.model, kind).left)
    return _flops(c.model, c.model.vocabulary or 0, length, pairs) * c.train.batch_size


def _flops(c: config.Model, vocabulary: int, tokens: int, pairs: int) -> int:
    return 6 * product_weights(c, vocabulary) * tokens + 3 * attention_flops(c.heads, c.head_dim, pairs)


def attention_flops(heads: int, head_dim: int, pairs: int) -> int:
    """Returns the model FLOPs of one attention forward pass over `pairs` unmasked pairs. Backward: twice as many."""
    return 4 * heads * head_dim * pairs


def product_weights(c: config.Model, vocabulary: int) -> int:
    """Returns the number of matrix weights: those of the layers and the output projection, not the embedding."""
    attention = 2 * (c.heads + c.kv_heads) * c.head_dim
    return c.layers * c.dim * (attention + 3 * c.feed_forward) + vocabulary * c.dim


def visible_pairs(positions: np.ndarray, segment_ids: np.ndarray | None, window: int | None) -> int:
    """Returns the number of unmasked (query, key) pairs under a causal mask.

    Args:
      positions: int32 [B, L], counted from the start of each segment.
      segment_ids: int32 [B, L]; negative ids are padding, which neither attends nor is attended to. None: each row is
        one segment.
      window: number of preceding tokens that a token attends to, besides itself; None for its whole segment.
    """
    preceding = positions if window is None else np.minimum(positions, window)
    return int(np.sum(preceding + 1, where=_unpadded(positions, segment_ids), dtype=np.int64))


def _unpadded(positions: np.ndarray, segment_ids: np.ndarray | None) -> np.ndarray:
    """Returns True for the tokens that are not padding, boolean [B, L]."""
    return np.ones(positions.shape, bool) if segment_ids is None else segment_ids >= 0


def document_pairs(length: int, window: int | None) -> int:
    """Returns `visible_pairs` of one document of `length` tokens."""
    reach = length if window is None else min(length, window + 1)
    return reach * (reach + 1) // 2 + (length - reach) * reach


def peak_flops() -> float | None:
    """Returns the peak bfloat16 FLOP/s of all devices together; None if unknown."""
    chip = CHIPS.get(jax.devices()[0].device_kind)
    return None if chip is None else chip.flops * jax.device_count()
