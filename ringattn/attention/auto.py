"""strategy="auto": decides by the law of overlap, from what is known of the chip, and says why.

A hop of the ring is free if its compute takes at least as long as its transfer (Ring Attention, arXiv 2310.01889):
c local tokens attend in 4 c^2 H D / (utilisation * FLOP/s) and travel in 2 c G D bytes / (bytes/s), so that

    c >= utilisation * (FLOP/s / link bytes/s) * (G / H) * (bytes of an element / 2)

twice that where causal work is balanced, because a hop has half of it, and 1.2 times for a backward pass that does 2.5
times the work and sends 3 times the bytes: K/V, and their gradients in float32.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp

from ringattn.attention.mask import Mask, needed_hops
from ringattn.hardware import CHIPS

UTILISATION = 0.7
"""Share of the peak that the best kernels reach (head dim 128, long sequences): a faster kernel hides less."""
GATHERED = 0.25
"""Share of a device's memory that gathered K/V and their gradients may take."""


class Choice(NamedTuple):
    """A strategy, and the sentences that say why."""

    strategy: str
    reasons: tuple[str, ...]


def choose_strategy(
    shards: int | tuple[int, int],
    *,
    queries: int,
    keys: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    batch: int = 1,
    dtype: Any = "bfloat16",
    mask: Mask = Mask(),
    layout: str = "contiguous",
    device_kind: str = "cpu",
) -> Choice:
    """What `strategy="auto"` picks, and why.

    Args:
      shards: devices over which the sequence lies; (outer, inner) where `axis` is a pair.
      queries, keys: tokens of each that one device holds.
      heads, kv_heads, head_dim, batch: of one device's query, key and value.
      dtype, mask, layout: as of `ringattn.attention`.
      device_kind: as JAX calls the chip, see `ringattn.hardware.CHIPS`.

    Returns:
      "ring", "ulysses" ("usp" for a pair of axes) or "gather", with reasons.
    """
    pair = not isinstance(shards, int)
    devices, inner = (shards[0] * shards[1], shards[1]) if pair else (shards, shards)
    if devices == 1:
        return Choice("ring", ("one device: nothing is sent",))
    hops = len(needed_hops(mask, layout, devices, queries, keys))
    if hops < devices - 1:
        return Choice("ring", (f"the mask needs {hops} of {devices - 1} hops, and only a ring leaves out the others",))
    chip = CHIPS.get(device_kind)
    if chip is None:
        return Choice("ring", (f"nothing is known of {device_kind!r}: a ring's memory does not grow with the devices",))
    width, balanced = jnp.dtype(dtype).itemsize, mask.causal and layout != "contiguous"
    least = UTILISATION * chip.flops / chip.link_bandwidth * kv_heads / heads * (width / 2) * 1.2 * (1 + balanced)
    law = f"{device_kind} at {UTILISATION:.0%} of {chip.flops / 1e12:,.0f} TFLOP/s, {chip.link_bandwidth / 1e9:,.0f} "
    law += f"GB/s a link, {heads} heads on {kv_heads}: a hop hides its transfer from {least:,.0f} local queries on"
    if queries >= least:
        return Choice("ring", (law, f"there are {queries:,}: nothing is waited for, and memory stays flat"))
    # Seconds that are not hidden. All-gather and all-to-all use a link's both directions, a ring one.
    turn = (devices - 1) * 2 * batch * keys * kv_heads * head_dim * width / chip.link_bandwidth
    waits = {"ring": turn * (1 - queries / least), "gather": turn / 2}
    room = 2 * devices * batch * keys * kv_heads * head_dim * (width + 4)
    reasons = [law, f"there are {queries:,}: a ring waits {1 - queries / least:.0%} of its time on the wire"]
    if room > GATHERED * chip.memory:
        del waits["gather"]
        taken = f"{room / 2**30:.1f} GiB of {chip.memory / 2**30:.0f}"
        reasons += [f"gathered K/V and their gradients take too much memory, {taken}"]
    name, split = ("usp" if pair else "ulysses"), f"{kv_heads} K/V heads over {inner} devices"
    if kv_heads % inner:
        reasons += [f"{name} cannot split {split}"]
    else:
        elements = 2 * batch * head_dim * (queries * heads + keys * kv_heads)
        exchanged = elements * width * (1 - 1 / inner) / chip.link_bandwidth / 2
        rest = turn * inner / devices * max(1 - queries * inner / least, 0) if pair else 0
        waits[name] = exchanged + rest
        reasons += [f"{name} can split {split}"]
    best = min(waits, key=lambda each: waits[each])
    compared = ", ".join(f"{each} {seconds * 1e6:,.0f}" for each, seconds in waits.items())
    return Choice(best, (*reasons, f"microseconds waited for in a forward pass: {compared}"))
