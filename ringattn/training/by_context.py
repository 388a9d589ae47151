"""Loss by number of preceding tokens, which shows up to what length more context helps."""

import re
from typing import Any

import numpy as np
from jaxtyping import Float, Int

FIRST_RANGE = 64
"""Size of the first range in tokens."""
KEY_PREFIX = "eval/loss/"
"""'eval/loss/64-127' is the loss of tokens with 64 to 127 preceding tokens in their document, or in their row with
data.separate_documents=False."""


def context_ranges(length: int) -> list[tuple[int, int]]:
    """Returns ranges (first, last) of positions, doubling in size: 0-63, 64-127, 128-255, ... up to `length` - 1."""
    starts = [0]
    while max(2 * starts[-1], FIRST_RANGE) < length:
        starts.append(max(2 * starts[-1], FIRST_RANGE))
    return list(zip(starts, [*(start - 1 for start in starts[1:]), length - 1], strict=True))


def sums_by_context(values: Float[np.ndarray, "B L"], positions: Int[np.ndarray, "B L"]) -> Float[np.ndarray, " R"]:
    """Returns the float64 sum of `values` over the tokens of each range of `context_ranges(L)`."""
    starts = [first for first, _ in context_ranges(values.shape[1])]
    indices = np.searchsorted(starts, positions.ravel(), side="right") - 1
    return np.bincount(indices, values.ravel().astype(np.float64), len(starts))


def named_losses(nats: Float[np.ndarray, " R"], weights: Float[np.ndarray, " R"], length: int) -> dict[str, float]:
    """Returns the mean loss of each range with nonzero weight, by its key, for sequences of `length` tokens."""
    ranges = context_ranges(length)
    return {
        f"{KEY_PREFIX}{first}-{last}": float(sum_ / weight)
        for (first, last), sum_, weight in zip(ranges, nats, weights, strict=True)
        if weight > 0
    }


def losses_by_context(row: dict[str, Any]) -> dict[tuple[int, int], float]:
    """Returns the loss of each range in a validation row of metrics.jsonl, in order. Ignores other names."""
    found = ((re.fullmatch(rf"{KEY_PREFIX}(\d{{1,18}})-(\d{{1,18}})", name), value) for name, value in row.items())
    losses = {(int(match[1]), int(match[2])): value for match, value in found if match}
    return {(first, last): losses[first, last] for first, last in sorted(losses)}
