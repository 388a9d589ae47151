"""The whole train step, compiled ahead of time for devices that need not be there: does it fit, what takes the room."""

import importlib.util
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import P
from jax.experimental import topologies

from ringattn import config
from ringattn.data import Batch
from ringattn.hardware import CHIPS
from ringattn.mesh import TOKENS, abstract, arrange, check, in_words, resolve, start
from ringattn.model import count_parameters
from ringattn.training.optimizer import learning_rate, optimizer
from ringattn.training.run import model_of
from ringattn.training.step import TrainState, make_initial_state, make_train_step


@dataclass(frozen=True)
class Plan:
    """Bytes are those of each device."""

    topology: str
    device_kind: str
    mesh: dict[str, int]
    parameters: int
    tokens: int
    """Of one row."""
    state_bytes: int
    """Parameters and optimizer state, float32, this device's pieces."""
    gradient_bytes: int
    """This device's pieces of the gradient, float32."""
    argument_bytes: int
    """What the step is given: the state and the batch."""
    temporary_bytes: int | None
    """What it needs beside that; None if it does not fit."""
    host_bytes: int | None
    """What it keeps in the host's memory meanwhile, for each device."""
    memory_bytes: int | None
    """What a device has, where that is known."""
    compile_seconds: float
    refusal: str | None
    """What the compiler says where it does not fit."""


def plan(c: config.Config, topology: str) -> Plan:
    """Compiles one update of `c` for a topology such as 'v5e:8x8', 'v5p:4x4x4' or 'cpu:8'. No device holds anything.

    Raises ValueError if there is no such topology, no TPU compiler (the extra `tpu`), if `c` does not fit its mesh, or
    has several stages (`c.stage(2)` is one of them).
    """
    if len(c.stages) > 1:
        raise ValueError(f"a plan is of one stage, but {c.name} has {len(c.stages)}: say which, such as --stage 2")
    devices = _devices(topology)
    mesh = arrange(resolve(c.mesh, len(devices)), devices)
    check(c, mesh)
    began, refusal, found = time.monotonic(), None, None
    with jax.set_mesh(mesh):
        state, batch, step = abstract_step(c, mesh)
        try:
            found = step.lower(state, batch).compile().memory_analysis()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            refusal = next((line.strip() for line in str(error).splitlines() if "xceed" in line), str(error)[:500])
    chip = CHIPS.get(devices[0].device_kind)
    return Plan(
        topology=topology,
        device_kind=devices[0].device_kind,
        mesh=dict(mesh.shape),
        parameters=count_parameters(state.params),
        tokens=c.data.seq_len,
        state_bytes=_bytes(state),
        gradient_bytes=_bytes(state.params),
        argument_bytes=_bytes(state) + _bytes(batch),
        temporary_bytes=None if found is None else found.temp_size_in_bytes,
        host_bytes=None if found is None else found.host_temp_size_in_bytes,
        memory_bytes=None if chip is None else int(chip.memory),
        compile_seconds=time.monotonic() - began,
        refusal=refusal,
    )


def abstract_step(c: config.Config, mesh: jax.sharding.Mesh) -> tuple[TrainState, Batch, Any]:
    """Shapes of the state and of a batch, as they lie on the mesh, and the jitted step that takes them."""
    vocabulary = c.model.vocabulary
    if vocabulary is None:
        raise ValueError(
            "model.vocabulary=None: a plan reads no tokenizer, so say how many ids: --model.vocabulary 32000"
        )
    make_model = model_of(c, vocabulary)
    update, schedule = optimizer(c.optimizer, c.train.steps), learning_rate(c.optimizer, c.train.steps)
    state = abstract(jax.eval_shape(make_initial_state(make_model, update)), mesh)
    return state, _batch(c, mesh), make_train_step(make_model, vocabulary, update, schedule)


def _devices(topology: str) -> Sequence[Any]:
    platform, _, size = topology.partition(":")
    if platform == "cpu" and size.isdecimal():
        return list(start(config.Mesh(simulate=int(size))).devices.flat)
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError("a plan for TPUs needs their compiler: pip install -e '.[tpu]' (on any Linux machine)")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")  # libtpu asks for it where it finds no TPU
    jax.config.update("jax_platforms", "cpu")
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except Exception as error:  # the plugin raises nothing narrower
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        cure = "use one such as v5e:8x8, v5p:4x4x4, v6e:16x16 or cpu:8"
        raise ValueError(f"--topology {topology}: {reason}: {cure}") from None


def _batch(c: config.Config, mesh: jax.sharding.Mesh) -> Batch:
    parts = c.train.accumulate
    shape, sharding = (parts, c.train.batch_size // parts, c.data.seq_len), jax.NamedSharding(mesh, P(None, *TOKENS))
    kinds = dict.fromkeys(Batch._fields, jnp.int32) | {"weights": jnp.float32}
    arrays: dict[str, Any] = {
        name: jax.ShapeDtypeStruct(shape, kind, sharding=sharding) for name, kind in kinds.items()
    }
    return Batch(**arrays)


def _bytes(tree: Any) -> int:
    """Of a tree of abstract arrays, on each device."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def report(found: Plan) -> Iterator[str]:
    """A plan in words, line by line."""
    yield f"{found.topology}, {math.prod(found.mesh.values())} of {found.device_kind}, mesh {in_words(found.mesh)}"
    yield f"{found.parameters:,} parameters, rows of {found.tokens:,} tokens"
    rows = {"state (parameters, AdamW)": found.state_bytes, "arguments (state, batch)": found.argument_bytes}
    if found.temporary_bytes is not None:
        activations = found.temporary_bytes - found.gradient_bytes
        rows |= {"temporaries": found.temporary_bytes, "  without the gradient": activations}
        rows |= {"arguments and temporaries": found.argument_bytes + found.temporary_bytes}
    if found.host_bytes:
        rows["in the host's memory"] = found.host_bytes
    yield "of each device:"
    for name, size in rows.items():
        yield f"  {name:<28}{size / 2**30:9.2f} GiB"
    yield f"compiled in {found.compile_seconds:.0f} s: " + (
        "it fits" if found.refusal is None else f"it does not fit: {found.refusal}"
    )
