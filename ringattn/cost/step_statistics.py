"""Statistics of a compiled training step: compile time, FLOPs, memory and communication."""

from collections.abc import Iterator
from typing import Any

import jax

from ringattn import config
from ringattn.attn.auto import strategy_for
from ringattn.attn.traffic import Traffic, traffic
from ringattn.cost.flops import RECOMPUTED
from ringattn.cost.memory import device_memory, program_memory
from ringattn.mesh.axes import DATA, SEQUENCE, TENSOR, context_shards
from ringattn.model.families import layer_kinds, layer_mask
from ringattn.units import bytes_in_words

Statistics = dict[str, Any]
"""The content of compiled.json."""


def memory_statistics(compiled: jax.stages.Compiled) -> dict[str, int | None] | None:
    """Returns the memory of `compiled` per device, its peak as `total`, and that of a `device`; None if unknown."""
    plan = program_memory(compiled)
    if plan is None:
        return None
    parts = {"arguments": plan.arguments, "temporaries": plan.temporaries, "new_results": plan.results}
    return parts | {"total": plan.peak, "device": device_memory(jax.local_devices()[0])}


def attention_statistics(c: config.Config, mesh: jax.sharding.Mesh) -> Statistics:
    """Returns the bytes that one device sends per step, and the strategy and hops of a layer of each of the `kinds`.

    A layer that saves the output of attention does not rotate K/V a third time, but repeats the all-to-all of ulysses
    and usp.
    """
    sizes, (outer, inner) = mesh.shape, (mesh.shape[name] for name in SEQUENCE)
    rows, tokens = c.train.batch_size // (sizes[DATA] * c.train.accumulate), c.data.seq_len // context_shards(mesh)
    query, key = (
        jax.ShapeDtypeStruct((rows, tokens, heads // sizes[TENSOR], c.model.head_dim), c.model.dtype)
        for heads in (c.model.heads, c.model.kv_heads)
    )
    layout, segments = c.attention.layout, c.data.separate_documents
    device_kind = mesh.devices.flat[0].device_kind
    # Like attention(), which runs a plain ring over both axes if either has size 1.
    over = (outer, inner) if c.attention.strategy == "usp" or min(outer, inner) > 1 else outer * inner
    kinds, forward, backward = {}, 0, 0
    for kind, layers in layer_kinds(c.model).items():
        mask, strategy = layer_mask(c.model, kind), c.attention.strategy
        if strategy == "auto":
            strategy = strategy_for(query, key, mask, layout, over, device_kind)
        sent: Traffic = traffic(strategy, over, query, key, mask, layout, segments)
        repeated = c.model.remat != "off" and strategy in ("ulysses", "usp")
        exchanging = inner if strategy == "usp" else outer * inner
        exchanged = traffic("ulysses", exchanging, query, key, mask, layout, segments)
        calls = layers * c.train.accumulate
        forward += calls * sent.forward
        again = sent.forward if RECOMPUTED[c.model.remat][1] else repeated * exchanged.forward
        backward += calls * (sent.backward + again)
        kinds[kind] = {"layers": layers, "strategy": strategy, "hops": sent.hops, "max_hops": sent.max_hops}
    return {"kinds": kinds, "forward_bytes_sent": forward, "backward_bytes_sent": backward}


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
    parts = [_describe_kind(kind if len(sent["kinds"]) > 1 else "", layer) for kind, layer in sent["kinds"].items()]
    forward, backward = (bytes_in_words(sent[f"{name}_bytes_sent"]) for name in ("forward", "backward"))
    yield f"attention: {', '.join(parts)}; each device sends {forward} forward, {backward} backward per step"


def _describe_kind(kind: str, layer: Statistics) -> str:
    """Returns strategy and hops of a kind of layers: 'ring, 7 of 7 hops per layer' or 'ring, ... per window layer'."""
    name = f"{kind} layer" if kind else "layer"
    if layer["max_hops"]:
        return f"{layer['strategy']}, {layer['hops']} of {layer['max_hops']} hops per {name}"
    return f"{layer['strategy']} per {name}" if kind else layer["strategy"]
