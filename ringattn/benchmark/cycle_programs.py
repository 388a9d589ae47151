"""Programs whose cycles are counted: a pass of a ring, and a training step. Compiled for the devices of a topology."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Format, Layout

from ringattn import config
from ringattn.attn.mask import Mask
from ringattn.benchmark.subjects import Case, Inputs, make_attend, make_pass
from ringattn.cost.attention_kernels import Heads, KernelSpec, ring_kernels, step_heads, step_rings
from ringattn.cost.flops import useful_step_flops
from ringattn.cost.visited import Ring
from ringattn.mesh.axes import HEADS, TOKENS
from ringattn.mesh.devices import resolve
from ringattn.mesh.topology import arrange_devices
from ringattn.model.families import layer_kinds, layer_pattern
from ringattn.planning.compile import abstract_step
from ringattn.planning.devices import devices_of


def topology_mesh(topology: str, section: config.Mesh | None = None) -> jax.sharding.Mesh:
    """Returns a mesh of the devices of a topology; by default one ring. Raises ValueError as `devices_of`."""
    devices = devices_of(topology)
    return arrange_devices(resolve(section or config.Mesh(), len(devices)), devices)


def make_ring(subject: config.Subject, case: Case) -> Ring:
    """Returns the ring of a subject. Raises ValueError for other strategies than a ring."""
    if subject.method != "ring":
        raise ValueError(f"cycles are counted for 'ring' subjects, not for {subject.method!r}")
    window = None if subject.window is None else (subject.window, 0)
    return Ring(Mask(True, window), subject.layout, case.shards, case.length // case.shards, subject.documents)


def heads_of(case: Case) -> Heads:
    """Returns the heads and the dtype of a case."""
    return Heads(case.heads, case.kv_heads, case.head_dim, case.dtype)


def compile_ring(subject: config.Subject, case: Case, mesh: jax.sharding.Mesh) -> str:
    """Returns the scheduled HLO of attention, forward and backward.

    The compiler chooses the memory layout of inputs and results, as it does within a model, whose projections write
    any layout at no cost. With the default layouts, it would add copies before the first hop and after the last.
    """

    def array(heads: int, dtype: str = case.dtype) -> jax.ShapeDtypeStruct:
        shape = 1, case.length, heads, case.head_dim
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=jax.NamedSharding(mesh, HEADS))

    ids = jax.ShapeDtypeStruct((1, case.length), jnp.int32, sharding=jax.NamedSharding(mesh, TOKENS))
    query, key = array(case.heads), array(case.kv_heads)
    inputs: Any = Inputs(query, key, key, query, ids if subject.documents > 1 else None)  # type: ignore[arg-type]
    formats = jax.tree.map(lambda x: Format(Layout.AUTO, x.sharding), inputs)
    run = make_pass("forward+backward", make_attend(subject, mesh))
    with jax.set_mesh(mesh):
        jitted = jax.jit(run, in_shardings=(formats,), out_shardings=Format(Layout.AUTO))
        compiled = jitted.lower(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), inputs)).compile()
    return compiled.as_text() or ""


class Step:
    """A training step on a topology, from a training config and a kernel."""

    def __init__(self, path: str, topology: str, kernel: str):
        """Raises ValueError if the config or the topology is not valid, or if the config has layers of two kinds."""
        loaded = config.read(Path(path), config.Config)
        if len(layer_kinds(loaded.model)) > 1:
            rule = "has layers of two kinds, whose kernels cannot be told apart in a compiled program"
            raise ValueError(f"{path}: model.pattern={layer_pattern(loaded.model)} {rule}; use a pattern of one kind")
        attention = replace(loaded.attention, kernel=kernel)
        self.config = replace(loaded, attention=attention)
        self.mesh = topology_mesh(topology, loaded.mesh)

    @property
    def ring(self) -> Ring:
        """The ring of every layer."""
        return step_rings(self.config, self.mesh)[0][1]

    @property
    def heads(self) -> Heads:
        """The heads of one device."""
        return step_heads(self.config.model, self.mesh)

    def kernels(self) -> list[KernelSpec]:
        """Returns the kernels of a hop."""
        return ring_kernels(self.ring, self.heads, segments=self.config.data.separate_documents)

    def useful_flops(self, layers: int | None = None) -> float:
        """Returns the useful FLOPs of an update per device, for rows of one document; `layers`: of so many layers only,
        without the output projection."""
        c = self.config
        if layers is None:
            return useful_step_flops(c) / self.mesh.size
        one = replace(c, model=replace(c.model, layers=layers))
        logits = 6 * c.model.dim * (c.model.vocabulary or 0) * c.data.seq_len * c.train.batch_size
        return (useful_step_flops(one) - logits) / self.mesh.size

    def compile(self) -> str:
        """Returns the scheduled HLO."""
        with jax.set_mesh(self.mesh):
            state, batch, step = abstract_step(self.config, self.mesh)
            return step.lower(state, batch).compile().as_text() or ""
