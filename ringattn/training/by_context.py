"""Loss by how much context a token has: what a long context is worth, and where it stops to help."""

from typing import Any

import numpy as np
from jaxtyping import Float, Int

FIRST = 64
"""Tokens of the first range."""
KEY = "eval/loss/"
"""What the keys begin with: 'eval/loss/64-127' is of tokens that have 64 to 127 of their document before them."""


def context_ranges(length: int) -> list[tuple[int, int]]:
    """[first, last] places in a document, from 0, that double: 0-63, 64-127, 128-255, ... to a row's end."""
    starts = [0]
    while max(2 * starts[-1], FIRST) < length:
        starts.append(max(2 * starts[-1], FIRST))
    return list(zip(starts, [*(start - 1 for start in starts[1:]), length - 1], strict=True))


def sums_by_context(values: Float[np.ndarray, "B L"], positions: Int[np.ndarray, "B L"]) -> Float[np.ndarray, " R"]:
    """Sums of `values`, in float64, over the tokens of each of `context_ranges(L)`."""
    starts = [first for first, _ in context_ranges(values.shape[1])]
    numbers = np.searchsorted(starts, positions.ravel(), side="right") - 1
    return np.bincount(numbers, values.ravel().astype(np.float64), len(starts))


def named_losses(nats: Float[np.ndarray, " R"], weights: Float[np.ndarray, " R"], length: int) -> dict[str, float]:
    """The mean loss of each range of rows of `length` tokens that any weight lies on, under its key."""
    ranges = context_ranges(length)
    return {
        f"{KEY}{first}-{last}": float(sum_ / weight)
        for (first, last), sum_, weight in zip(ranges, nats, weights, strict=True)
        if weight > 0
    }


def losses_by_context(row: dict[str, Any]) -> dict[tuple[int, int], float]:
    """The ranges that an evaluation's row of metrics.jsonl holds, in order, each with its loss."""
    found = {name.removeprefix(KEY): value for name, value in row.items() if name.startswith(KEY)}
    pairs = {tuple(map(int, name.split("-"))): value for name, value in found.items()}
    return {(first, last): pairs[first, last] for first, last in sorted(pairs)}
