"""Compiles a train step ahead of time, for devices that need not be present, and reports its memory."""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import P

from ringattn import config
from ringattn.cost.memory import host_memory, program_memory
from ringattn.cost.minimum import check_minimum
from ringattn.data import Batch
from ringattn.hardware import CHIPS
from ringattn.mesh.axes import TOKENS, abstract, describe_sizes
from ringattn.mesh.devices import check_divisible, resolve
from ringattn.mesh.topology import arrange_devices
from ringattn.model.build import model_factory
from ringattn.model.transformer import count_parameters
from ringattn.planning.devices import devices_of
from ringattn.training.optimizer import learning_rate, optimizer
from ringattn.training.step import TrainState, TrainStep, make_initial_state, make_train_step
from ringattn.units import bytes_in_words

COMPILED = 100
"""A step that needs at least so many times the memory of a device is refused without compiling it. The compiler would
need minutes or abort, and all figures would be as far off."""


@dataclass(frozen=True)
class Plan:
    """A compiled train step. All bytes are per device."""

    topology: str
    device_kind: str
    mesh: dict[str, int]
    parameters: int
    tokens: int
    """Tokens per row."""
    state_bytes: int
    """This device's shards of parameters and optimizer state, float32."""
    gradient_bytes: int
    """This device's shards of the gradient, float32."""
    argument_bytes: int
    """The step's arguments: state and batch."""
    temporary_bytes: int | None
    """Everything else that the step needs on the device; None if the compiler refused it."""
    host_bytes: int | None
    """Temporaries in the host's memory; None if the compiler refused the step."""
    memory_bytes: int | None
    """Memory of the device, or its share of this machine's memory for a CPU device; None if unknown."""
    compile_seconds: float
    refusal: str | None
    """The reason why the step does not fit, such as the compiler's error; None if it fits."""

    @property
    def fits(self) -> bool:
        """True if the step fits the memory of the devices."""
        return self.refusal is None


def plan(c: config.Config, topology: str, compiling: AbstractContextManager[Any] | None = None) -> Plan:
    """Compiles one update of `c` for a topology such as 'v5e:8x8', 'v5p:4x4x4' or 'cpu:8'; allocates nothing on it.

    After all checks, it compiles inside the context `compiling`, such as a display.

    Raises ValueError if the topology does not exist, if the TPU compiler (the extra `tpu`) is not installed, if `c`
    does not fit its mesh, if the step needs more than `COMPILED` times the memory of a device, or if `c` has several
    stages; `c.stage(2)` is the config of one stage.
    """
    if len(c.stages) > 1:
        raise ValueError(f"{c.name} has {len(c.stages)} stages, but a plan covers one; choose one, such as --stage 2")
    devices = devices_of(topology)
    mesh = arrange_devices(resolve(c.mesh, len(devices)), devices)
    check_divisible(c, mesh)
    limit = _memory(devices)
    check_minimum(c, mesh, limit, factor=COMPILED)
    began, refusal, memory = time.monotonic(), None, None
    with jax.set_mesh(mesh):
        state, batch, step = abstract_step(c, mesh)
        try:
            with compiling or nullcontext():
                memory = program_memory(step.lower(state, batch).compile())
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            refusal = next((line.strip() for line in str(error).splitlines() if "xceed" in line), str(error)[:500])
    if memory is not None and limit is not None and devices[0].platform == "cpu" and memory.total > limit:
        needed, available = (bytes_in_words(len(devices) * size) for size in (memory.total, limit))
        refusal = f"{len(devices)} devices need {needed}, but this machine has {available}"
    return Plan(
        topology=topology,
        device_kind=devices[0].device_kind,
        mesh=dict(mesh.shape),
        parameters=count_parameters(state.params),
        tokens=c.data.seq_len,
        state_bytes=shard_bytes(state),
        gradient_bytes=shard_bytes(state.params),
        argument_bytes=shard_bytes(state) + shard_bytes(batch),
        temporary_bytes=None if memory is None else memory.temporaries,
        host_bytes=None if memory is None else memory.host,
        memory_bytes=limit,
        compile_seconds=time.monotonic() - began,
        refusal=refusal,
    )


def abstract_step(c: config.Config, mesh: jax.sharding.Mesh) -> tuple[TrainState, Batch, TrainStep]:
    """Abstract state and batch, sharded over the mesh, and the jitted train step that takes them."""
    vocabulary = required_vocabulary(c.model)
    make_model = model_factory(c, vocabulary)
    update, schedule = optimizer(c.optimizer), learning_rate(c.optimizer, c.train.steps)
    state = abstract(jax.eval_shape(make_initial_state(make_model, update)), mesh)
    return state, _abstract_batch(c, mesh), make_train_step(make_model, vocabulary, update, schedule)


def required_vocabulary(c: config.Model) -> int:
    """Returns the vocabulary size. Raises ValueError if it is None."""
    if c.vocabulary is None:
        rule = "must be the number of token ids, because a plan reads no tokenizer"
        raise ValueError(f"model.vocabulary=None {rule}; use --model.vocabulary 32000 or another number")
    return c.vocabulary


def _memory(devices: Sequence[Any]) -> int | None:
    """Returns the memory of each device in bytes; None if unknown."""
    if devices[0].platform == "cpu":
        memory = host_memory()
        return None if memory is None else memory // len(devices)
    chip = CHIPS.get(devices[0].device_kind)
    return None if chip is None else int(chip.memory)


def _abstract_batch(c: config.Config, mesh: jax.sharding.Mesh) -> Batch:
    """Arrays [microbatches, B / microbatches, L]."""
    count = c.train.accumulate
    shape, sharding = (count, c.train.batch_size // count, c.data.seq_len), jax.NamedSharding(mesh, P(None, *TOKENS))
    dtypes = dict.fromkeys(Batch._fields, jnp.int32) | {"weights": jnp.float32}
    arrays: dict[str, Any] = {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for name, dtype in dtypes.items()
    }
    return Batch(**arrays)


def shard_bytes(tree: Any) -> int:
    """Bytes per device of a tree of abstract arrays."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def report_step(plan: Plan) -> Iterator[str]:
    """Yields the lines of a plan's report."""
    yield f"{plan.topology}, {math.prod(plan.mesh.values())} of {plan.device_kind}, mesh {describe_sizes(plan.mesh)}"
    yield f"{plan.parameters:,} parameters, rows of {plan.tokens:,} tokens"
    sizes = {"state (parameters, AdamW)": plan.state_bytes, "arguments (state, batch)": plan.argument_bytes}
    if plan.temporary_bytes is not None:
        sizes["temporaries"] = plan.temporary_bytes
        sizes["  without the gradient"] = plan.temporary_bytes - plan.gradient_bytes
        sizes["arguments and temporaries"] = plan.argument_bytes + plan.temporary_bytes
    if plan.host_bytes:
        sizes["host memory"] = plan.host_bytes
    yield "memory per device:"
    for name, size in sizes.items():
        yield f"  {name:<28}{bytes_in_words(size):>12}"
    result = "it fits" if plan.refusal is None else f"it does not fit: {plan.refusal}"
    yield f"compiled in {plan.compile_seconds:.0f} s: {result}"
