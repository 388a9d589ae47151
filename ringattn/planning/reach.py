"""Finds the longest rows that compile and fit, by compiling the step for several lengths."""

import time
from collections.abc import Callable

from ringattn import config
from ringattn.config.stages import with_values
from ringattn.cost.memory import program_memory
from ringattn.cost.minimum import minimum_memory, saved_bytes
from ringattn.mesh.axes import context_shards
from ringattn.planning.compile import MaxContext, Target, compile_step
from ringattn.planning.memory import device_bytes, host_limit, reason_against
from ringattn.units import duration_in_words

LOCAL = 1024
"""Lengths tried are multiples of so many tokens per device: tiles of kernels and chunks of layers are then full."""
PRECISION = 16
"""The search ends when the next length tried would be less than a 16th longer."""


def max_context(c: config.Config, target: Target, say: Callable[[str], None]) -> MaxContext:
    """Returns the longest rows of `c` that fit the target, to a 16th. Reports each length with the elapsed time.

    Starts at `data.seq_len`, or at the analytic upper bound if that is less. The next lengths come from the memory of
    those before, which grows linearly, and then from bisection.

    Raises ValueError if not even LOCAL tokens per device fit.
    """
    began, unit = time.monotonic(), LOCAL * context_shards(target.mesh)
    bound = upper_bound(c, target, unit)
    tried: dict[int, str] = {}
    fits, refused = 0, bound + unit
    length = max(min(c.data.seq_len // unit * unit, bound), unit)
    while True:
        reason, fraction = _try(c, length, target)
        tried[length] = "fits" if reason is None else reason
        elapsed = duration_in_words(time.monotonic() - began)
        say(f"[{elapsed}] {length:,} tokens: {tried[length]}")
        fits, refused = (length, refused) if reason is None else (fits, length)
        grain = max(unit, fits // PRECISION // unit * unit)
        if refused - fits <= grain:
            break
        guess = refused if fraction is None else int(length / fraction)
        if guess >= refused and refused <= bound:  # no length has the predicted memory: bisect
            guess = (fits + refused) // 2
        length = min(max(guess // unit * unit, fits + grain), refused - unit)
    if not fits:
        raise ValueError(f"--max-context: not even rows of {unit:,} tokens fit {target.topology}; use more devices")
    return MaxContext(fits, refused if refused <= bound else None, tried)


def upper_bound(c: config.Config, target: Target, unit: int) -> int:
    """Returns the longest rows, a multiple of `unit`, that state and saved activations alone leave room for."""
    low, high = 1, 2
    while high * unit < 2**31 and _could_fit(c, high * unit, target):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _could_fit(c, middle * unit, target) else (low, middle)
    return low * unit


def _could_fit(c: config.Config, length: int, target: Target) -> bool:
    longer = with_values(c, {"data.seq_len": length})
    host, limit = host_limit(target.device), target.limit
    fits_host = host is None or saved_bytes(longer, target.mesh.shape).host <= host
    return fits_host and (limit is None or minimum_memory(longer, target.mesh.shape).total <= limit)


def _try(c: config.Config, length: int, target: Target) -> tuple[str | None, float | None]:
    """Returns why rows of `length` do not fit, None if they do, and the fraction of the memory that they take.

    The fraction counts only what grows with the length, of what the state leaves; None if the compiler gave no figure.
    """
    longer = with_values(c, {"data.seq_len": length})
    (program, refusal, peak), _, _ = compile_step(longer, target)
    limit, state = target.limit, minimum_memory(longer, target.mesh.shape).state
    if program is not None:
        memory = program_memory(program)
        assert memory is not None
        known = {"parameters": 0, "optimizer": 0, "batch": 0, "gradients": 0}
        needed, host = device_bytes(memory, limit, known, 0, None), host_limit(target.device)
        refusal, peak = reason_against(target.device, target.mesh.size, needed, memory.host, host), needed.peak
        if host is not None and limit is not None and memory.host * limit > host * (peak or 0):
            return refusal, memory.host / host
    if peak is None or limit is None or limit <= state:
        return refusal, None
    return refusal, (peak - state) / (limit - state)
