"""Finds the longest rows that compile and fit, by compiling the step for several lengths."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ringattn import config
from ringattn.config.stages import with_values
from ringattn.cost.minimum import host_bytes, host_moments, minimum_memory
from ringattn.mesh.axes import context_shards
from ringattn.planning.compile import Target, needed
from ringattn.planning.longest import MaxContext, Need
from ringattn.planning.memory import host_limit
from ringattn.units import duration_in_words

LOCAL = 1024
"""Lengths tried are multiples of so many tokens per device: tiles of kernels and chunks of layers are then full."""
PRECISION = 16
"""The search ends when rows that are a 16th longer do not fit, or would not by the memory of those that do."""

Measure = Callable[[config.Config, Target], Need]
"""Compiles a step for a target and returns the memory that it needs."""


@dataclass(frozen=True)
class Slopes:
    """Bytes that each further token of a row takes, per device; None if unknown."""

    device: float | None = None
    host: float | None = None


def max_context(
    c: config.Config,
    target: Target,
    say: Callable[[str], None],
    measure: Measure = needed,
    known: Need | None = None,
) -> MaxContext:
    """Returns the longest rows of `c` that fit the target, to a 16th. Reports each length with the elapsed time.

    Starts at `data.seq_len`, or at the analytic upper bound if that is less. `known` is what rows of `data.seq_len`
    need, if it is known. Raises ValueError if not even LOCAL tokens per device fit.
    """
    found = search(c, target, say, measure, known=known)
    if not found.tokens:
        unit = LOCAL * context_shards(target.mesh)
        raise ValueError(f"--max-context: not even rows of {unit:,} tokens fit {target.topology}; use more devices")
    return found


def search(
    c: config.Config,
    target: Target,
    say: Callable[[str], None],
    measure: Measure = needed,
    slopes: Slopes = Slopes(),
    known: Need | None = None,
) -> MaxContext:
    """Searches for `max_context`. Returns 0 tokens if no rows fit.

    Memory grows linearly with the length, so the memory of the lengths tried predicts the longest that fits. The next
    length tried is a 32nd shorter, so that it is likely to fit and to end the search. If prediction and compiler
    disagree, the search bisects. `slopes` are those of the same step on the same kind of devices, if they are known:
    the memory of one length then suffices.
    """
    began, unit = time.monotonic(), LOCAL * context_shards(target.mesh)
    if not could_fit(c, unit, target):
        return MaxContext(0, unit, {})
    bound = upper_bound(c, target, unit)
    tried: dict[int, Need] = {}
    fits, refused = 0, bound + unit
    length = max(min(c.data.seq_len // unit * unit, bound), unit)
    while True:
        given = known if length == c.data.seq_len else None
        tried[length] = found = given or measure(with_values(c, {"data.seq_len": length}), target)
        elapsed = duration_in_words(time.monotonic() - began)
        say(f"[{elapsed}] {target.topology}, {length:,} tokens: {found.refusal or 'fits'}")
        fits, refused = (length, refused) if found.refusal is None else (fits, length)
        longest, is_certain = predicted(c, target, tried, slopes)
        next_length = fits + max(unit, fits // PRECISION)
        if refused <= next_length or (fits and is_certain and longest is not None and longest < next_length):
            return MaxContext(fits, refused if refused in tried else None, tried)
        guess = refused if longest is None else int(longest / (1 + 0.5 / PRECISION))
        if refused in tried and (longest is None or longest >= refused):
            guess = (fits + refused) // 2
        length = min(max(guess, next_length) // unit * unit, refused - unit)


def predicted(c: config.Config, target: Target, tried: Mapping[int, Need], slopes: Slopes) -> tuple[float | None, bool]:
    """Returns the length at which device or host reach their limit by the memory of the lengths tried; None if unknown.

    Also returns False if it rests on the assumption that, apart from state, all memory grows with the length.
    """
    state = minimum_memory(c, target.mesh.shape).state
    device = {length: need.peak for length, need in tried.items() if need.peak}
    host = {length: need.host for length, need in tried.items() if need.host}
    lines = (
        _predicted(device, target.limit, state, slopes.device),
        _predicted(host, host_limit(target.device), host_moments(c, target.mesh.size), slopes.host),
    )
    return min((line for line in lines if line is not None), default=(None, False))


def _predicted(
    sizes: Mapping[int, int], limit: int | None, fixed: int, slope: float | None
) -> tuple[float, bool] | None:
    """Returns what `predicted` does, for one memory: from the two sizes nearest to the limit, or from one and `slope`.

    Without both, the size without `fixed` counts as proportional to the length.
    """
    if limit is None or not sizes:
        return None
    points = [(size, length) for length, size in sizes.items()]
    (size, length), *others = sorted(points, key=lambda point: abs(point[0] - limit))[:2]
    for other_size, other_length in others:
        if (other_size - size) * (other_length - length) > 0:
            slope = (other_size - size) / (other_length - length)
    growth = (size - fixed) / length if slope is None else slope
    return (length + (limit - size) / growth, slope is not None or not fixed) if growth > 0 else None


def slopes_of(found: MaxContext) -> Slopes:
    """Returns the bytes per token between the shortest and the longest of the rows tried."""

    def slope(sizes: dict[int, int]) -> float | None:
        if len(sizes) < 2:
            return None
        low, high = min(sizes), max(sizes)
        return (sizes[high] - sizes[low]) / (high - low)

    return Slopes(
        slope({length: need.peak for length, need in found.tried.items() if need.peak is not None}),
        slope({length: need.host for length, need in found.tried.items() if need.host is not None}),
    )


def upper_bound(c: config.Config, target: Target, unit: int) -> int:
    """Returns the longest rows, a multiple of `unit`, that state and saved activations alone leave room for."""
    low, high = 1, 2
    while high * unit < 2**31 and could_fit(c, high * unit, target):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if could_fit(c, middle * unit, target) else (low, middle)
    return low * unit


def could_fit(c: config.Config, length: int, target: Target) -> bool:
    """Returns False if state and saved activations of rows of `length` alone exceed the memory of device or host."""
    longer = with_values(c, {"data.seq_len": length})
    host, limit = host_limit(target.device), target.limit
    fits_host = host is None or host_bytes(longer, target.mesh.shape) <= host
    return fits_host and (limit is None or minimum_memory(longer, target.mesh.shape).total <= limit)
