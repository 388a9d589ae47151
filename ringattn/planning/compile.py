"""Compiles a train step ahead of time, for devices that need not be present, and plans its memory and its time."""

import math
import time
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import P

from ringattn import config
from ringattn.cost.memory import ProgramMemory, program_memory
from ringattn.cost.minimum import check_minimum, saved_bytes
from ringattn.cost.program import Program
from ringattn.data import Batch
from ringattn.mesh.axes import TOKENS
from ringattn.mesh.devices import check_divisible, check_kernel, resolve
from ringattn.mesh.gpu_flags import compiler_options
from ringattn.mesh.topology import arrange_devices
from ringattn.model.build import model_factory
from ringattn.model.transformer import count_parameters
from ringattn.planning.changes import Change, changed_steps
from ringattn.planning.devices import devices_of
from ringattn.planning.longest import MaxContext, Need, Reach
from ringattn.planning.memory import (
    DeviceBytes,
    compiled_saved_bytes,
    device_bytes,
    device_limit,
    host_limit,
    reason_against,
    refused_bytes,
)
from ringattn.planning.rank import Ranked
from ringattn.planning.schedule import Collective
from ringattn.planning.timing import StepTime, analyse, compiling_step_kernels
from ringattn.training.optimizer import learning_rate, optimizer
from ringattn.training.step import TrainState, TrainStep, abstract_state, make_initial_state, make_train_step

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
    fits: bool
    """True if the compiler accepted the step, and it fits the memory of devices and hosts."""
    refusal: str | None
    """The reason why the step does not fit, such as the compiler's error; None if it fits."""
    changes: list[Change]
    """Changes that reduce the memory, in order of their effect; empty if it fits."""
    device_bytes: DeviceBytes
    host_bytes: int | None
    """Activations and moments in the host's memory; None if the compiler refused the step."""
    host_limit: int | None
    """Memory of a host per device; None if unknown, or if it is the device's memory."""
    collectives: list[Collective]
    """All collectives of the schedule, and copies to and from the host; empty if the compiler refused the step."""
    time: StepTime | None
    """None if the compiler refused the step, or if the speed of the device is unknown."""
    compile_seconds: float
    max_context: MaxContext | None = None
    sweep: list[Reach] | None = None
    """In order of devices."""
    cached: str | None = None
    """The date when the step was compiled, if the plan is from the cache."""
    ranking: list[Ranked] = field(default_factory=list)
    """Candidates of strategy, layout, mesh and rematerialization; empty unless requested or left open by the config."""
    reasons: list[str] = field(default_factory=list)
    """Sentences that say which candidate is chosen, and why."""

    @property
    def need(self) -> Need:
        return Need(self.refusal, self.device_bytes.peak, self.host_bytes)

    def to_json(self) -> dict[str, Any]:
        """Returns the fields, with those that scripts read most at the top."""
        seconds = utilisation = None
        if self.time is not None:
            seconds, utilisation = self.time.seconds, self.time.utilisation
        return asdict(self) | {"step_seconds": seconds, "utilisation": utilisation}


class Target(NamedTuple):
    """Devices on which a step is to run."""

    topology: str
    mesh: jax.sharding.Mesh
    limit: int | None
    """Bytes that a program may use on a device; None if unknown."""

    @property
    def device(self) -> Any:
        return self.mesh.devices.flat[0]


def prepare(c: config.Config, topology: str) -> Target:
    """Returns the mesh of a topology, after all checks of `plan`. Raises ValueError as `plan`."""
    check_stages(c)
    devices = devices_of(topology)
    check_kernel(c, devices[0].platform)
    # The devices are given, as simulated ones are: `resolve` must not propose to simulate others.
    mesh = arrange_devices(resolve(replace(c.mesh, simulate=len(devices)), len(devices)), devices)
    check_divisible(c, mesh)
    target = Target(topology, mesh, device_limit(devices))
    check_minimum(c, mesh, target.limit, factor=COMPILED)
    required_vocabulary(c.model)
    return target


def check_stages(c: config.Config) -> None:
    """Raises ValueError if `c` has several stages."""
    if len(c.stages) > 1:
        raise ValueError(f"{c.name} has {len(c.stages)} stages, but a plan covers one; choose one, such as --stage 2")


class Compiled(NamedTuple):
    """A compiled step, or the reason why the compiler refused it."""

    program: jax.stages.Compiled | None
    refusal: str | None
    refused_bytes: int | None
    """The bytes that the refusal gives, if it is the device's memory that does not suffice."""


def compile_step(c: config.Config, target: Target) -> tuple[Compiled, TrainState, Batch]:
    """Compiles the step, and returns it with its abstract arguments."""
    with jax.set_mesh(target.mesh):
        state, batch, step = abstract_step(c, target.mesh)
        options: Any = compiler_options() if target.device.platform == "gpu" else None
        try:
            return Compiled(step.lower(state, batch).compile(options), None, None), state, batch
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return Compiled(None, *refused_bytes(str(error))), state, batch


def _memory(program: jax.stages.Compiled, target: Target) -> ProgramMemory:
    """Returns the memory of a compiled program; the peak at most the limit of the TPU compiler, which accepted it."""
    memory = program_memory(program)
    assert memory is not None
    if target.device.platform == "tpu" and target.limit is not None:
        memory = memory._replace(peak=min(memory.peak, target.limit - memory.program))
    return memory


def needed(c: config.Config, target: Target) -> Need:
    """Compiles the step and returns the memory that it needs, without the rest of a plan."""
    (program, refusal, refused), _, _ = compile_step(c, target)
    if program is None:
        return Need(refusal, refused, None)
    memory = _memory(program, target)
    parts = {"parameters": 0, "optimizer": 0, "batch": 0, "gradients": 0}  # only the peak is of interest
    device = device_bytes(memory, target.limit, parts, 0, None)
    against = reason_against(target.device, target.mesh.size, device, memory.host, host_limit(target.device))
    return Need(against, device.peak, memory.host)


def compile_plan(c: config.Config, target: Target) -> Plan:
    """Returns the plan of a step that `prepare` has checked."""
    began = time.monotonic()
    topology, mesh, limit = target
    times, collectives, memory, saved = None, [], None, saved_bytes(c, mesh.shape).device
    with compiling_step_kernels(c, topology, mesh) as kernels:
        (program, refusal, refused), state, batch = compile_step(c, target)
        if program is not None:
            memory = _memory(program, target)
            text = program.as_text() or ""
            times, collectives = analyse(text, c, mesh, kernels)
            saved = compiled_saved_bytes(Program(text), c, mesh.shape) if saved is None else saved
    known = {
        "parameters": shard_bytes(state.params),
        "optimizer": 0 if c.optimizer.offload else shard_bytes(state) - shard_bytes(state.params),
        "batch": shard_bytes(batch),
        "gradients": shard_bytes(state.params),
    }
    device = device_bytes(memory, limit, known, saved or 0, refused)
    host = host_limit(target.device)
    if memory is not None:
        refusal = reason_against(target.device, mesh.size, device, memory.host, host)
    return Plan(
        topology=topology,
        device_kind=target.device.device_kind,
        mesh=dict(mesh.shape),
        parameters=count_parameters(state.params),
        tokens=c.data.seq_len,
        fits=refusal is None,
        refusal=refusal,
        changes=[] if refusal is None else [each.change for each in changed_steps(c, mesh, topology, refusal)],
        device_bytes=device,
        host_bytes=None if memory is None else memory.host,
        host_limit=host,
        collectives=collectives,
        time=times,
        compile_seconds=time.monotonic() - began,
    )


def abstract_step(c: config.Config, mesh: jax.sharding.Mesh) -> tuple[TrainState, Batch, TrainStep]:
    """Abstract state and batch, sharded over the mesh, and the jitted train step that takes them."""
    vocabulary = required_vocabulary(c.model)
    make_model = model_factory(c, vocabulary)
    update, schedule = optimizer(c.optimizer), learning_rate(c.optimizer, c.train.steps)
    offload = c.optimizer.offload
    state = abstract_state(make_initial_state(make_model, update, offload), mesh, offload)
    return state, _abstract_batch(c, mesh), make_train_step(make_model, vocabulary, update, schedule, offload)


def required_vocabulary(c: config.Model) -> int:
    """Returns the vocabulary size. Raises ValueError if it is None."""
    if c.vocabulary is None:
        rule = "must be the number of token ids, because a plan reads no tokenizer"
        raise ValueError(f"model.vocabulary=None {rule}; use --model.vocabulary 32000 or another number")
    return c.vocabulary


def _abstract_batch(c: config.Config, mesh: jax.sharding.Mesh) -> Batch:
    """Arrays [microbatches, B / microbatches, L]; segment ids as in `data.PackedRows`."""
    count = c.train.accumulate
    shape, sharding = (count, c.train.batch_size // count, c.data.seq_len), jax.NamedSharding(mesh, P(None, *TOKENS))
    ids: Any = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding)
    weights: Any = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)
    return Batch(ids, ids, ids, ids if c.data.separate_documents else None, weights)


def shard_bytes(tree: Any) -> int:
    """Bytes per device of a tree of abstract arrays."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)
