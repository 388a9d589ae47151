"""Statistics of a compiled training step: compile time, FLOPs, memory and communication."""

from collections.abc import Iterator
from typing import Any

import jax

from ringattn import config
from ringattn.attn.auto import strategy_for
from ringattn.attn.traffic import Traffic, traffic
from ringattn.cost.memory import device_memory, program_memory
from ringattn.mesh.axes import DATA, SEQUENCE, TENSOR, context_shards
from ringattn.model.build import attention_mask
from ringattn.units import bytes_in_words

Statistics = dict[str, Any]
"""The content of compiled.json."""


def memory_statistics(compiled: jax.stages.Compiled) -> dict[str, int | None] | None:
    """Returns the memory of `compiled` per device, its `total`, and the memory of a `device`; None if unknown."""
    plan = program_memory(compiled)
    if plan is None:
        return None
    parts = {"arguments": plan.arguments, "temporaries": plan.temporaries, "new_results": plan.results}
    return parts | {"total": plan.total, "device": device_memory(jax.local_devices()[0])}


def attention_statistics(c: config.Config, mesh: jax.sharding.Mesh) -> Statistics:
    """Returns the strategy and hops of attention per layer, and the bytes that one device sends per step.

    A rematerialized layer does not rotate K/V a third time, but repeats the all-to-all of ulysses and usp.
    """
    sizes, (outer, inner) = mesh.shape, (mesh.shape[name] for name in SEQUENCE)
    rows, tokens = c.train.batch_size // (sizes[DATA] * c.train.accumulate), c.data.seq_len // context_shards(mesh)
    query, key = (
        jax.ShapeDtypeStruct((rows, tokens, heads // sizes[TENSOR], c.model.head_dim), c.model.dtype)
        for heads in (c.model.heads, c.model.kv_heads)
    )
    mask = attention_mask(c)
    strategy = c.attention.strategy
    # Like attention(), which runs a plain ring over both axes if either has size 1.
    over = (outer, inner) if strategy == "usp" or min(outer, inner) > 1 else outer * inner
    if strategy == "auto":
        kind = mesh.devices.flat[0].device_kind
        strategy = strategy_for(query, key, mask, c.attention.layout, over, kind)
    sent: Traffic = traffic(strategy, over, query, key, mask, c.attention.layout)
    repeated = c.model.remat != "off" and strategy in ("ulysses", "usp")
    exchanged = traffic("ulysses", inner if strategy == "usp" else outer * inner, query, key, mask, c.attention.layout)
    calls = c.model.layers * c.train.accumulate
    return {
        "strategy": strategy,
        "hops": sent.hops,
        "max_hops": sent.max_hops,
        "forward_bytes_sent": calls * sent.forward,
        "backward_bytes_sent": calls * (sent.backward + repeated * exchanged.forward),
    }


def describe_statistics(statistics: Statistics) -> Iterator[str]:
    """Yields lines for the display."""
    yield (
        f"compiled in {statistics['compile_seconds']:.1f} s: {statistics['parameters']:,} parameters, "
        f"{statistics['flops_per_token'] / 1e6:,.1f} MFLOPs per token"
    )
    if memory := statistics["device_bytes"]:
        limit = "" if memory["device"] is None else f" of {bytes_in_words(memory['device'])}"
        parts = [f"{name} {bytes_in_words(memory[name])}" for name in ("arguments", "temporaries")]
        yield f"memory per device: {bytes_in_words(memory['total'])}{limit} required, {', '.join(parts)}"
    sent = statistics["attention"]
    hops = f", {sent['hops']} of {sent['max_hops']} hops per layer" if sent["max_hops"] else ""
    forward, backward = (bytes_in_words(sent[f"{name}_bytes_sent"]) for name in ("forward", "backward"))
    yield f"attention: {sent['strategy']}{hops}; each device sends {forward} forward, {backward} backward per step"
