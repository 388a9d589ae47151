"""strategy="auto": picks a strategy from a roofline-style cost model, and gives its reasons.

A hop of the ring is hidden if its compute takes at least as long as its transfer (Ring Attention, arXiv 2310.01889).
With c local tokens and b bytes per element, compute takes 4 c^2 H D / (utilisation * FLOP/s), and the transfer
2 c G D b / bandwidth. Hence

    c >= utilisation * (FLOP/s / bandwidth) * (G / H) * (b / 2)

Balanced causal work doubles the bound, because a hop then has half of the work. A backward pass multiplies it by 1.2:
it does 2.5 times the work and sends 3 times the bytes (K/V, and dK/dV in float32). The factor 3 holds for bfloat16; for
float32 inputs it is 2, so that their bound is conservative. Below the bound, part of the transfer is exposed. Its
time is compared with the exposed time of an all-gather and of an all-to-all. The links of TPUs are modelled as a ring,
those of other chips as a switch. Hops of a window may have less work than the model assumes.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike

from ringattn.attn.hops import needed_distances
from ringattn.attn.kernels.protocol import ArrayOrShape
from ringattn.attn.mask import Mask
from ringattn.hardware import CHIPS, Chip, platform
from ringattn.layout import check_length

UTILISATION = 0.7
"""Fraction of peak FLOP/s that the best kernels reach (head dim 128, long sequences).

With a slower kernel, shorter shards suffice.
"""
GATHER_MEMORY = 0.25
"""Maximum fraction of a device's memory for gathered K/V and their gradients."""


class Choice(NamedTuple):
    """A strategy and the reasons for it, as sentences."""

    strategy: str
    reasons: tuple[str, ...]


class Call(NamedTuple):
    """Sizes of one device's query, key and value."""

    queries: int
    keys: int
    heads: int
    kv_heads: int
    head_dim: int
    batch: int = 1
    dtype: str = "bfloat16"


def choose_strategy(
    shards: int | tuple[int, int],
    *,
    queries: int,
    keys: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    batch: int = 1,
    dtype: DTypeLike = "bfloat16",
    mask: Mask = Mask(),
    layout: str | None = "contiguous",
    device_kind: str = "cpu",
) -> Choice:
    """Returns the strategy that `strategy="auto"` picks, with reasons.

    Args:
      shards: number of devices over which the sequence is sharded; (outer, inner) if `axis` is a pair.
      queries, keys: tokens per device.
      heads, kv_heads, head_dim, batch: sizes of one device's query, key and value; all have one head dim.
      dtype, mask: as in `ringattn.attention`.
      layout: as in `ringattn.attention`; None if positions are given: every hop is then made.
      device_kind: JAX's name of the chip, see `ringattn.hardware.CHIPS`.

    Returns:
      "ring", "ulysses" ("usp" for a pair of axes) or "gather", with reasons.

    Raises:
      ValueError: if `layout` does not fit the number of tokens.
    """
    is_pair = isinstance(shards, tuple)
    outer, inner = shards if is_pair else (shards, 1)
    devices, exchanging = outer * inner, inner if is_pair else outer
    for name, tokens in {"queries": queries, "keys": keys}.items():
        shards_name = "outer * inner" if is_pair else "shards"
        check_length(tokens * devices, layout or "contiguous", devices, f"total {name}", shards_name)
    _, sends = _hops_and_sends(shards, queries, keys, mask, layout)
    if not sends:
        return Choice("ring", ("every device holds all keys that its queries see: nothing is sent",))
    chip = CHIPS.get(device_kind)
    if chip is None:
        unknown = f"device_kind={device_kind!r} has unknown FLOP/s and bandwidth; known are {', '.join(CHIPS)}"
        return Choice("ring", (unknown, "a ring's memory does not grow with the number of devices"))
    width, balanced = jnp.dtype(dtype).itemsize, mask.causal and layout != "contiguous"
    min_queries = min_local_queries(chip, heads, kv_heads, dtype, balanced)
    law = f"{device_kind} at {UTILISATION:.0%} of {chip.flops / 1e12:,.0f} TFLOP/s, {chip.link_bandwidth / 1e9:,.0f} "
    law += f"GB/s per link, {heads} heads, {kv_heads} K/V heads: "
    law += f"a hop needs {min_queries:,.0f} local queries to hide its send"
    if queries >= min_queries:
        return Choice("ring", (law, f"{queries:,} local queries: communication is fully hidden"))
    call = Call(queries, keys, heads, kv_heads, head_dim, batch, jnp.dtype(dtype).name)
    exposed = exposed_seconds(chip, shards, call, mask, layout, is_torus=platform(device_kind) == "tpu")
    reasons = [
        law,
        f"{queries:,} local queries: a ring exposes {1 - queries / min_queries:.0%} of each of {sends} sends",
    ]
    gathered = 2 * devices * batch * keys * kv_heads * head_dim * (width + 4)
    if gathered > GATHER_MEMORY * chip.memory:
        del exposed["gather"]
        taken = f"{gathered / 2**30:.1f} GiB of {chip.memory / 2**30:.0f}"
        reasons += [f"gathered K/V and their gradients take too much memory, {taken}"]
    name, split = ("usp" if is_pair else "ulysses"), f"{kv_heads} K/V heads over {exchanging} devices"
    reasons += [f"{name} {'can' if name in exposed else 'cannot'} split {split}"]
    best = min(exposed, key=lambda name: exposed[name])
    compared = ", ".join(f"{name} {seconds * 1e6:,.0f}" for name, seconds in exposed.items())
    return Choice(best, (*reasons, f"exposed microseconds per forward pass: {compared}"))


def exposed_seconds(
    chip: Chip, shards: int | tuple[int, int], call: Call, mask: Mask, layout: str | None, *, is_torus: bool
) -> dict[str, float]:
    """Returns the exposed communication of a forward pass in seconds, by strategy.

    These are "ring", "gather" and, if it can split the heads, "ulysses" ("usp" for a pair of axes). `shards`, `mask`
    and `layout` are those of `choose_strategy`; `is_torus` is True for the links of TPUs.
    """
    is_pair = isinstance(shards, tuple)
    outer, inner = shards if is_pair else (shards, 1)
    devices, exchanging = outer * inner, inner if is_pair else outer
    hops, sends = _hops_and_sends(shards, call.queries, call.keys, mask, layout)
    balanced = mask.causal and layout != "contiguous"
    min_queries = min_local_queries(chip, call.heads, call.kv_heads, call.dtype, balanced)
    hop = 2 * call.batch * call.keys * call.kv_heads * call.head_dim * jnp.dtype(call.dtype).itemsize
    hop /= chip.link_bandwidth
    exposed = {
        "ring": sends * hop * max(1 - call.queries / min_queries, 0),
        "gather": (devices - 1) * hop / (2 if is_torus else 1),
    }
    if call.kv_heads % exchanging == 0:
        # Query, key, value and output. On a ring of p links used in both directions, a byte crosses p / 4 of them.
        moved = hop * (1 + call.queries * call.heads / (call.keys * call.kv_heads))
        moved *= max(exchanging / 8, 1 / 2) if is_torus else 1 - 1 / exchanging
        ring = hops * hop * max(1 - call.queries * inner / min_queries, 0) if is_pair else 0
        exposed["usp" if is_pair else "ulysses"] = moved + ring
    return exposed


def _hops_and_sends(
    shards: int | tuple[int, int], queries: int, keys: int, mask: Mask, layout: str | None
) -> tuple[int, int]:
    """Returns the hops of the outer ring, and all sends of a ring, nested if `shards` is a pair."""
    outer, inner = shards if isinstance(shards, tuple) else (shards, 1)
    hops = outer - 1 if layout is None else len(needed_distances(mask, layout, outer * inner, queries, keys, inner))
    return hops, (hops + 1) * inner - 1


def min_local_queries(
    chip: Chip, heads: int, kv_heads: int, dtype: DTypeLike = "bfloat16", balanced: bool = False
) -> float:
    """Returns the smallest number of local queries for which a hop hides its transfer, forward and backward.

    Args:
      chip: an entry of `ringattn.hardware.CHIPS`.
      heads, kv_heads: number of query heads and of K/V heads.
      dtype: dtype of query, key and value.
      balanced: True if a hop has half of the work, as in a causal zigzag.
    """
    width = jnp.dtype(dtype).itemsize
    return UTILISATION * chip.flops / chip.link_bandwidth * kv_heads / heads * (width / 2) * 1.2 * (1 + balanced)


def strategy_for(
    query: ArrayOrShape,
    key: ArrayOrShape,
    mask: Mask,
    layout: str | None,
    shards: int | tuple[int, int],
    device_kind: str,
) -> str:
    """Returns the strategy that `choose_strategy` picks for one device's query and key."""
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
