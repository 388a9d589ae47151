"""Compiles a step of decoding ahead of time, for devices that need not be present."""

import math
import re
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import P

from ringattn import config
from ringattn.cost.cycles import CYCLE_FLOPS
from ringattn.cost.memory import program_memory
from ringattn.cost.program import Program
from ringattn.generation import cache as caches
from ringattn.generation.programs import Pending, compute_format, generation_model, make_programs
from ringattn.generation.sampling import Sampling
from ringattn.hardware import CHIPS, chip_name
from ringattn.mesh.axes import DATA, FSDP, abstract, describe_sizes
from ringattn.mesh.devices import check_divisible, resolve
from ringattn.mesh.topology import arrange_devices
from ringattn.model.build import model_factory
from ringattn.planning.compile import required_vocabulary, shard_bytes
from ringattn.planning.devices import devices_of
from ringattn.planning.memory import device_limit
from ringattn.units import bytes_in_words


class Sizes(NamedTuple):
    """Bytes per device."""

    cache: int
    parameters: int


def lower_decode(
    c: config.Model, mesh: jax.sharding.Mesh, tokens: int, cache_dtype: str = "bfloat16"
) -> tuple[Any, Sizes]:
    """Returns the lowered step of greedy decoding, with a cache of `tokens` tokens in one row per data shard.

    Parameters and compute are in model.dtype. The vocabulary must be set. Call it under `jax.set_mesh(mesh)`.
    """
    vocabulary, c, rows = required_vocabulary(c), generation_model(c, c.dtype), mesh.shape[DATA]
    make_model = model_factory(config.Config(model=c), vocabulary)
    params = abstract(jax.eval_shape(jax.jit(lambda: nnx.split(make_model())[1])), mesh)

    def in_compute_dtype(leaf: Any) -> jax.ShapeDtypeStruct:
        dtype = c.dtype if FSDP in leaf.sharding.spec else leaf.dtype
        return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=compute_format(leaf, c.dtype))

    params = jax.tree.map(in_compute_dtype, params)
    cache = abstract(jax.eval_shape(lambda: caches.empty(c, rows, tokens, cache_dtype, mesh)), mesh)

    def replicated(shape: tuple[int, ...], dtype: Any) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, P(*(None for _ in shape))))

    vectors = replicated((rows,), jnp.int32), replicated((rows,), jnp.float32)
    logits = replicated((rows, vocabulary), jnp.float32)
    pending = Pending(logits, None, replicated((), jnp.int32), *vectors)
    values = jax.tree.map(lambda x: replicated((), x.dtype), jax.eval_shape(lambda: Sampling().values(1)))
    lowered = make_programs(c, mesh).step.lower(params, cache, None, pending, None, values)  # type: ignore[attr-defined]
    return lowered, Sizes(shard_bytes(cache), shard_bytes(params))


@dataclass(frozen=True)
class DecodePlan:
    """A compiled step of decoding. All bytes and times are per device."""

    topology: str
    device_kind: str
    mesh: dict[str, int]
    tokens: int
    """Tokens that the cache has room for, in one row per data shard."""
    cache_bytes: int
    parameter_bytes: int
    temporary_bytes: int
    memory_bytes: int | None
    """Limit of a program's memory on the device; None if unknown."""
    sent: dict[str, int]
    """Number of each collective operation in the program. Those in the loop over layers run once per layer."""
    read_seconds: float | None
    """Time to read the cache once from the device's memory; None if the bandwidth is unknown."""
    other_seconds: float | None
    """The compiler's estimate for all but attention to the cache, without waiting for transfers; None if unknown."""
    compile_seconds: float

    @property
    def fits(self) -> bool:
        """True if the step fits the memory of the device, or if that is unknown."""
        total = self.cache_bytes + self.parameter_bytes + self.temporary_bytes
        return self.memory_bytes is None or total <= self.memory_bytes


def plan_decode(c: config.Config, topology: str, compiling: AbstractContextManager[Any] | None = None) -> DecodePlan:
    """Compiles a step of greedy decoding with a bfloat16 cache of data.seq_len tokens. See `planning.plan`."""
    devices = devices_of(topology)
    mesh = arrange_devices(resolve(c.mesh, len(devices)), devices)
    check_divisible(replace(c, train=replace(c.train, batch_size=mesh.shape[DATA], accumulate=1)), mesh)
    required_vocabulary(c.model)
    began = time.monotonic()
    with jax.set_mesh(mesh), compiling or nullcontext():
        lowered, sizes = lower_decode(c.model, mesh, c.data.seq_len)
        compiled = lowered.compile()
    kind, memory, text = chip_name(devices), program_memory(compiled), compiled.as_text() or ""
    assert memory is not None
    chip, per_cycle = CHIPS.get(kind), CYCLE_FLOPS.get(kind)
    collectives = Counter(
        re.findall(r" (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(", text)
    )
    return DecodePlan(
        topology=topology,
        device_kind=kind,
        mesh=dict(mesh.shape),
        tokens=c.data.seq_len,
        cache_bytes=sizes.cache,
        parameter_bytes=sizes.parameters,
        temporary_bytes=memory.temporaries + memory.results,
        memory_bytes=device_limit(devices),
        sent=dict(collectives),
        read_seconds=None if chip is None else sizes.cache / chip.memory_bandwidth,
        other_seconds=None if chip is None or per_cycle is None else Program(text).cost.cycles * per_cycle / chip.flops,
        compile_seconds=time.monotonic() - began,
    )


def report_decode(plan: DecodePlan) -> Iterator[str]:
    """Yields the lines of a plan's report."""
    yield f"{plan.topology}, {math.prod(plan.mesh.values())} of {plan.device_kind}, mesh {describe_sizes(plan.mesh)}"
    yield f"a step of decoding with a cache of {plan.tokens:,} tokens; memory per device:"
    sizes = {"cache": plan.cache_bytes, "parameters": plan.parameter_bytes, "temporaries": plan.temporary_bytes}
    for name, size in (sizes | {"in all": sum(sizes.values())}).items():
        yield f"  {name:<28}{bytes_in_words(size):>12}"
    if plan.read_seconds is not None and plan.other_seconds is not None:
        total = plan.read_seconds + plan.other_seconds
        yield "time per token, without waiting for transfers:"
        yield f"  {'reading the cache once':<28}{1000 * plan.read_seconds:>9.2f} ms"
        yield f"  {'all else, by the compiler':<28}{1000 * plan.other_seconds:>9.2f} ms"
        yield f"  {'in all':<28}{1000 * total:>9.2f} ms, {total / plan.read_seconds:.2f} times reading the cache"
    yield f"collectives: {', '.join(f'{count} {name}' for name, count in plan.sent.items())}"
    yield f"compiled in {plan.compile_seconds:.0f} s: {'it fits' if plan.fits else 'it does not fit'}"
