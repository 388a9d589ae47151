"""What a step turned out to be when it was compiled: the time it took, its work, its memory, what it sends."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from ringattn import config
from ringattn.attention.auto import choose_for
from ringattn.attention.traffic import Traffic, traffic
from ringattn.hardware import CHIPS
from ringattn.mesh import DATA, SEQUENCE, TENSOR, shards
from ringattn.model import count_parameters
from ringattn.training.flops import step_flops
from ringattn.training.run import Run, mask_of
from ringattn.training.step import TrainState, TrainStep
from ringattn.units import bytes_in_words

Facts = dict[str, Any]


def compile_step(run: Run, state: TrainState) -> tuple[TrainStep, Facts]:
    """The compiled update, and what is known of it; `flops_per_token` is of the first batch."""
    c, batch = run.config, run.rows.batch(int(state.step) - run.first)
    arrays, began = run.on_devices(batch), time.monotonic()
    train_step = run.train_step.lower(state, arrays).compile()
    facts = {
        "compile_seconds": time.monotonic() - began,
        "parameters": count_parameters(state.params),
        "flops_per_token": step_flops(c, run.tokenizer.size, batch) / batch.tokens.size,
        "device_bytes": planned_bytes(train_step),
        "attention": attention_facts(c, run.mesh),
    }
    return train_step, facts


def planned_bytes(compiled: Any) -> dict[str, int | None] | None:
    """What the compiler plans for each device, and what memory that has (None: not known); None if it does not say.

    `total` is what a step holds at its height: arguments, temporaries, results that do not take an argument's place.
    """
    plan = compiled.memory_analysis()
    if plan is None:
        return None
    parts = {
        "arguments": plan.argument_size_in_bytes,
        "temporaries": plan.temp_size_in_bytes,
        "new_results": plan.output_size_in_bytes - plan.alias_size_in_bytes,
    }
    return parts | {"total": sum(parts.values()), "device": device_memory()}


def device_memory() -> int | None:
    """Bytes that a device has for arrays, or that such a chip has at all; None where neither is known."""
    device = jax.local_devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit")
    chip = CHIPS.get(device.device_kind)
    return limit if limit is not None or chip is None else int(chip.memory)


def attention_facts(c: config.Config, mesh: jax.sharding.Mesh) -> Facts:
    """Strategy and hops of a layer's attention, and the bytes that all layers make a device send in a step.

    A layer that is computed again turns no K/V a third time, but exchanges heads for sequence once more.
    """
    sizes, (outer, inner) = mesh.shape, (mesh.shape[name] for name in SEQUENCE)
    rows, tokens = c.train.batch_size // (sizes[DATA] * c.train.accumulate), c.data.seq_len // shards(mesh)
    query, key = (
        jax.ShapeDtypeStruct((rows, tokens, heads // sizes[TENSOR], c.model.head_dim), c.model.dtype)
        for heads in (c.model.heads, c.model.kv_heads)
    )
    mask = mask_of(c)
    strategy = c.attention.strategy
    # As in attention: rings of one, and one ring, are a ring.
    over = (outer, inner) if strategy == "usp" or min(outer, inner) > 1 else outer * inner
    if strategy == "auto":
        kind = mesh.devices.flat[0].device_kind
        strategy = choose_for(query, key, mask, c.attention.layout, over, kind)
    sent: Traffic = traffic(strategy, over, query, key, mask, c.attention.layout)
    # A layer that is computed again keeps what was exchanged back, and exchanges the rest once more.
    again = c.model.remat != "off" and strategy in ("ulysses", "usp")
    exchanged = traffic("ulysses", inner if strategy == "usp" else outer * inner, query, key, mask, c.attention.layout)
    calls = c.model.layers * c.train.accumulate
    return {
        "strategy": strategy,
        "hops": sent.hops,
        "most_hops": sent.most,
        "forward_bytes_sent": calls * sent.forward,
        "backward_bytes_sent": calls * (sent.backward + again * exchanged.forward),
    }


def in_words(facts: Facts) -> Iterator[str]:
    """Lines for the screen."""
    yield (
        f"compiled in {facts['compile_seconds']:.1f} s: {facts['parameters']:,} parameters, "
        f"{facts['flops_per_token'] / 1e6:,.1f} MFLOPs a token"
    )
    if plan := facts["device_bytes"]:
        has = "" if plan["device"] is None else f" of {bytes_in_words(plan['device'])}"
        parts = [f"{name} {bytes_in_words(plan[name])}" for name in ("arguments", "temporaries")]
        yield f"memory of a device: {bytes_in_words(plan['total'])} planned{has}, {', '.join(parts)}"
    sent = facts["attention"]
    hops = f", {sent['hops']} of {sent['most_hops']} hops a layer" if sent["most_hops"] else ""
    forward, backward = (bytes_in_words(sent[f"{name}_bytes_sent"]) for name in ("forward", "backward"))
    yield f"attention by {sent['strategy']}{hops}: a device sends {forward} a step forward, {backward} backward"


def write(facts: Facts, path: Path) -> None:
    """By the first process alone."""
    if jax.process_index() == 0:
        path.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
