"""strategy="auto": decides by the law of overlap, from what is known of the chip, and says why.

A hop of the ring is free if its compute takes at least as long as its transfer (Ring Attention, arXiv 2310.01889):
c local tokens attend in 4 c^2 H D / (utilisation * FLOP/s) and travel in 2 c G D bytes / (bytes/s), so that

    c >= utilisation * (FLOP/s / link bytes/s) * (G / H) * (bytes of an element / 2)

twice that where causal work is balanced, because a hop has half of it, and 1.2 times for a backward pass that does 2.5
times the work and sends 3 times the bytes: K/V, and their gradients in float32. What is not hidden is waited for, and
compared with what an all-gather or an exchange of heads would wait. The links of TPUs are taken as a ring, those of
other chips as leading to a switch. A window's hops may have less work than the law supposes.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp

from ringattn.attention.mask import Mask, needed_hops
from ringattn.hardware import CHIPS, Chip
from ringattn.layout import check_length

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
    layout: str | None = "contiguous",
    device_kind: str = "cpu",
) -> Choice:
    """What `strategy="auto"` picks, and why.

    Args:
      shards: devices over which the sequence lies; (outer, inner) where `axis` is a pair.
      queries, keys: tokens of each that one device holds.
      heads, kv_heads, head_dim, batch: of one device's query, key and value.
      dtype, mask: as of `ringattn.attention`.
      layout: likewise; None where positions are given, so that any hop may be needed.
      device_kind: as JAX calls the chip, see `ringattn.hardware.CHIPS`.

    Returns:
      "ring", "ulysses" ("usp" for a pair of axes) or "gather", with reasons.

    Raises:
      ValueError: if the tokens cannot lie in that layout.
    """
    pair = isinstance(shards, tuple)
    outer, inner = shards if pair else (shards, 1)
    devices, swapped = outer * inner, inner if pair else outer
    for name, tokens in {"queries": queries, "keys": keys}.items():
        check_length(tokens * devices, layout or "contiguous", devices, f"the {name} of all shards")
    hops = outer - 1 if layout is None else len(needed_hops(mask, layout, devices, queries, keys, inner))
    sends = (hops + 1) * inner - 1
    if not sends:
        return Choice("ring", ("each device holds all that its queries see: nothing is sent",))
    chip = CHIPS.get(device_kind)
    if chip is None:
        known = f"nothing is known of {device_kind!r}, only of {', '.join(CHIPS)}"
        return Choice("ring", (known, "a ring's memory does not grow with the devices"))
    width, balanced = jnp.dtype(dtype).itemsize, mask.causal and layout != "contiguous"
    least = least_queries(chip, heads, kv_heads, dtype, balanced)
    law = f"{device_kind} at {UTILISATION:.0%} of {chip.flops / 1e12:,.0f} TFLOP/s, {chip.link_bandwidth / 1e9:,.0f} "
    law += f"GB/s a link, {heads} heads on {kv_heads}: a hop hides its transfer from {least:,.0f} local queries on"
    if queries >= least:
        return Choice("ring", (law, f"there are {queries:,}: nothing is waited for, and memory stays flat"))
    torus = device_kind.startswith("TPU")
    hop = 2 * batch * keys * kv_heads * head_dim * width / chip.link_bandwidth
    waits = {"ring": sends * hop * (1 - queries / least), "gather": (devices - 1) * hop / (2 if torus else 1)}
    reasons = [law, f"there are {queries:,}: a ring waits for {1 - queries / least:.0%} of each of {sends} transfers"]
    room = 2 * devices * batch * keys * kv_heads * head_dim * (width + 4)
    if room > GATHERED * chip.memory:
        del waits["gather"]
        taken = f"{room / 2**30:.1f} GiB of {chip.memory / 2**30:.0f}"
        reasons += [f"gathered K/V and their gradients take too much memory, {taken}"]
    name, split = ("usp" if pair else "ulysses"), f"{kv_heads} K/V heads over {swapped} devices"
    if kv_heads % swapped:
        reasons += [f"{name} cannot split {split}"]
    else:
        # Query, key, value and output; on a ring, both ways round, a byte crosses a quarter of its links.
        moved = hop * (1 + queries * heads / (keys * kv_heads))
        moved *= max(swapped / 8, 1 / 2) if torus else 1 - 1 / swapped
        waits[name] = moved + (hops * hop * max(1 - queries * inner / least, 0) if pair else 0)
        reasons += [f"{name} can split {split}"]
    best = min(waits, key=lambda each: waits[each])
    compared = ", ".join(f"{each} {seconds * 1e6:,.0f}" for each, seconds in waits.items())
    return Choice(best, (*reasons, f"microseconds waited for in a forward pass: {compared}"))


def least_queries(chip: Chip, heads: int, kv_heads: int, dtype: Any = "bfloat16", balanced: bool = False) -> float:
    """The law: queries that a device must hold for a hop to hide its transfer, forward and backward.

    Args:
      chip: of `ringattn.hardware.CHIPS`.
      heads, kv_heads, dtype: of query and key.
      balanced: whether a hop has half of the work, as in a causal zigzag.
    """
    width = jnp.dtype(dtype).itemsize
    return UTILISATION * chip.flops / chip.link_bandwidth * kv_heads / heads * (width / 2) * 1.2 * (1 + balanced)


def choose_for(
    query: Any, key: Any, mask: Mask, layout: str | None, shards: int | tuple[int, int], device_kind: str
) -> str:
    """What `choose_strategy` says of one device's queries and keys, arrays or `jax.ShapeDtypeStruct`."""
    return choose_strategy(
        shards,
        queries=query.shape[1],
        keys=key.shape[1],
        heads=query.shape[2],
        kv_heads=key.shape[2],
        head_dim=query.shape[3],
        batch=query.shape[0],
        dtype=query.dtype,
        mask=mask,
        layout=layout,
        device_kind=device_kind,
    ).strategy
