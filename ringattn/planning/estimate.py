"""Estimates the time of a train step, and the least memory that it needs, without compiling it.

The compute is FLOPs at stated utilisations of the chip's peak, with the recomputation of `model.remat` and the
imbalance of a contiguous causal layout. Added are transfers and copies that nothing hides:

- attention: the exposed seconds of `attn.auto`, times the bytes of forward and backward pass over those of a forward
  pass (`attn.traffic`);
- tensor axis: two all-reduces of the activations per layer in each pass;
- parameters: gathered in each pass, and their gradients scattered in float32. All of it counts as exposed, because
  compiled schedules gather the parameters of a layer right before it;
- host: copies of offloaded activations, as far as they take longer than the compute.

The links of TPUs are used in both directions. Between the hosts of GPUs, the network counts instead of NVLink.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ringattn import config
from ringattn.attn.auto import UTILISATION, Call, exposed_seconds
from ringattn.attn.mask import Mask
from ringattn.attn.traffic import traffic
from ringattn.config.stages import with_values
from ringattn.cost.attention_kernels import DIRECTIONS
from ringattn.cost.flops import RECOMPUTED, attention_flops, document_pairs, product_weights
from ringattn.cost.minimum import host_moments, minimum_memory, saved_bytes
from ringattn.hardware import CHIPS, NETWORKS, Chip, chip_name, host_bandwidth, platform
from ringattn.mesh.axes import CONTEXT, CONTEXT_OUTER, DATA, TENSOR, sequence_shards
from ringattn.mesh.processes import host_of
from ringattn.model.families import layer_kinds, layer_mask

PRODUCT_UTILISATION = 0.8
"""Fraction of peak FLOP/s assumed for matrix products outside of attention."""
NOMINAL = "TPU v5 lite"
"""Chip whose ratios of compute, memory and links are assumed for devices of unknown speed, such as CPUs."""


class Machine(NamedTuple):
    """Devices of one kind."""

    kind: str
    devices: int
    chip: Chip
    is_torus: bool
    """True for the links of TPUs."""
    devices_per_host: int
    """Number of devices on one fast network."""
    network: float
    """Bandwidth of a device to other hosts in bytes/s, one way."""

    @classmethod
    def of(cls, devices: Sequence[Any]) -> "Machine":
        """Returns the machine of JAX devices, which may be compile-only."""
        first, count = devices[0], len(devices)
        kind, network = chip_name(devices), NETWORKS.get(first.device_kind)
        chip = CHIPS.get(kind, CHIPS[NOMINAL])
        per_host = count
        if network is not None:
            per_host = sum(host_of(device) == host_of(first) for device in devices)
        is_torus = platform(kind) == "tpu"
        return cls(kind, count, chip, is_torus, per_host, network or chip.link_bandwidth)

    @property
    def is_nominal(self) -> bool:
        return self.kind not in CHIPS

    def bandwidth(self, group: int) -> float:
        """Returns the bandwidth between `group` consecutive devices."""
        return self.network if group > self.devices_per_host else self.chip.link_bandwidth


class Estimate(NamedTuple):
    """Seconds of a step, per device: compute, and transfers and copies that nothing hides."""

    compute: float
    attention: float
    tensor: float
    parameters: float
    host: float

    @property
    def seconds(self) -> float:
        return sum(self)

    def named(self) -> dict[str, float]:
        """Returns the parts by their names in reports."""
        names = "compute", "exposed attention transfers", "all-reduces", "parameter transfers", "exposed host copies"
        return dict(zip(names, self, strict=True))

    @property
    def transfers(self) -> float:
        return self.seconds - self.compute


def estimate(c: config.Config, sizes: Mapping[str, int], machine: Machine) -> Estimate:
    """Returns the estimated time of a train step of `c`, which leaves nothing to choose, on a mesh of `sizes`."""
    attention = compute = 0.0
    repeated_products, repeated_attention = RECOMPUTED[c.model.remat]
    kernels = (sum(DIRECTIONS.values()) + repeated_attention) * c.train.batch_size / machine.devices
    for kind, layers in layer_kinds(c.model).items():
        mask = layer_mask(c.model, kind)
        pairs, imbalance = document_pairs(c.data.seq_len, mask.left), _imbalance(c, sizes, mask)
        flops = attention_flops(c.model.heads, c.model.head_dim, pairs) * imbalance
        compute += layers * kernels * flops / (UTILISATION * machine.chip.flops)
        attention += layers * c.train.accumulate * _exposed(c, sizes, machine, mask)
    vocabulary = c.model.vocabulary or 0
    weights, layer_weights = product_weights(c.model, vocabulary), product_weights(c.model, 0)
    tokens = c.train.batch_size * c.data.seq_len
    products = (6 * weights + 2 * repeated_products * layer_weights) * tokens / machine.devices
    compute += products / (PRODUCT_UTILISATION * machine.chip.flops)
    copied = _copied_bytes(c, sizes) * c.train.accumulate + host_moments(c, machine.devices)
    copies = 2 * copied / host_bandwidth(machine.kind)
    return Estimate(
        compute=compute,
        attention=attention,
        tensor=_tensor_seconds(c, sizes, machine),
        parameters=_parameter_seconds(c, sizes, machine),
        host=max(copies - compute, 0.0),
    )


def _copied_bytes(c: config.Config, sizes: Mapping[str, int]) -> int:
    """Returns the bytes that a microbatch copies to the host, and back."""
    own = saved_bytes(c, sizes).host
    if c.model.remat != "offload_groups":
        return own
    return own + saved_bytes(with_values(c, {"model.remat": "offload"}), sizes).host  # of each group, one at a time


def _imbalance(c: config.Config, sizes: Mapping[str, int], mask: Mask) -> float:
    """Returns the work of the device with most visible pairs, relative to the mean."""
    shards = {"ulysses": 1, "usp": sizes[CONTEXT_OUTER]}.get(c.attention.strategy, sequence_shards(sizes))
    if c.attention.layout != "contiguous" or shards == 1:
        return 1.0
    length = c.data.seq_len
    ends = [document_pairs(length * shard // shards, mask.left) for shard in range(shards + 1)]
    return shards * max(end - start for start, end in pairwise(ends)) / ends[-1]


def _exposed(c: config.Config, sizes: Mapping[str, int], machine: Machine, mask: Mask) -> float:
    """Returns the exposed seconds of attention of one layer and microbatch, forward and backward."""
    members = sequence_shards(sizes)
    if members == 1:
        return 0.0
    call = _call(c, sizes)
    inner = sizes[CONTEXT] if sizes[CONTEXT_OUTER] > 1 else 1
    shards = (members // inner, inner) if inner > 1 else members
    strategy, layout = c.attention.strategy, c.attention.layout
    forward = _forward_seconds(machine, sizes, call, strategy, mask, layout)
    dtype = jnp.dtype(call.dtype)
    query = jax.ShapeDtypeStruct((call.batch, call.queries, call.heads, call.head_dim), dtype)
    key = jax.ShapeDtypeStruct((call.batch, call.keys, call.kv_heads, call.head_dim), dtype)
    sent = traffic(strategy, shards, query, key, mask, layout, segments=c.data.separate_documents)
    passes = 1 + sent.backward / max(sent.forward, 1)
    if RECOMPUTED[c.model.remat][1]:
        return forward * (passes + 1)
    if c.model.remat != "off" and strategy in ("ulysses", "usp"):  # recomputed layers exchange q, k and v again
        exchanging = inner if strategy == "usp" else members
        return forward * passes + _forward_seconds(machine, sizes, call, "ulysses", mask, layout, exchanging)
    return forward * passes


def _call(c: config.Config, sizes: Mapping[str, int]) -> Call:
    tokens, tensor = c.data.seq_len // sequence_shards(sizes), sizes[TENSOR]
    rows = max(c.train.batch_size // (sizes[DATA] * c.train.accumulate), 1)
    heads, kv_heads = c.model.heads // tensor, c.model.kv_heads // tensor
    return Call(tokens, tokens, heads, kv_heads, c.model.head_dim, rows, c.model.dtype)


def _forward_seconds(
    machine: Machine,
    sizes: Mapping[str, int],
    call: Call,
    strategy: str,
    mask: Mask,
    layout: str,
    exchanging: int | None = None,
) -> float:
    """Returns the exposed seconds of a forward pass; with `exchanging`, of the all-to-all of so many devices."""
    outer, inner, is_torus = sizes[CONTEXT_OUTER], sizes[CONTEXT], machine.is_torus

    def chip(devices: int) -> Chip:
        return machine.chip._replace(link_bandwidth=machine.bandwidth(devices * sizes[TENSOR]))

    if exchanging is not None:
        return exposed_seconds(chip(exchanging), exchanging, call, Mask(), None, is_torus=is_torus)["ulysses"]
    near, far = chip(inner), chip(outer * inner)
    if min(outer, inner) == 1 or strategy not in ("ring", "usp"):
        name = "ulysses" if strategy == "usp" and outer == 1 else "ring" if strategy == "usp" else strategy
        return exposed_seconds(far, outer * inner, call, mask, layout, is_torus=is_torus)[name]
    if near == far:
        return exposed_seconds(near, (outer, inner), call, mask, layout, is_torus=is_torus)[strategy]
    # Hops between hosts overlap with attention to the shards of a whole host.
    joined = call._replace(queries=call.queries * inner)
    between = exposed_seconds(far, outer, joined, mask, None, is_torus=is_torus)["ring"]
    if strategy == "usp":
        return between + exposed_seconds(near, inner, call, mask, None, is_torus=is_torus)["ulysses"]
    return between + outer * exposed_seconds(near, inner, call, mask, None, is_torus=is_torus)["ring"]


def _tensor_seconds(c: config.Config, sizes: Mapping[str, int], machine: Machine) -> float:
    tensor, passes = sizes[TENSOR], 2 + RECOMPUTED[c.model.remat][0]
    tokens = c.train.batch_size * c.data.seq_len // (sizes[DATA] * sequence_shards(sizes))
    sent = 2 * (tensor - 1) / tensor * tokens * c.model.dim * jnp.dtype(c.model.dtype).itemsize
    return c.model.layers * 2 * passes * sent / (machine.bandwidth(tensor) * (1 + machine.is_torus))


def _parameter_seconds(c: config.Config, sizes: Mapping[str, int], machine: Machine) -> float:
    members = machine.devices // sizes[TENSOR]
    gathers = max(2, 1 + RECOMPUTED[c.model.remat][0])
    weights = product_weights(c.model, c.model.vocabulary or 0) / sizes[TENSOR]
    sent = weights * (gathers * jnp.dtype(c.model.dtype).itemsize + 4) * (members - 1) / members
    return c.train.accumulate * sent / (machine.bandwidth(machine.devices) * (1 + machine.is_torus))


def least_bytes(c: config.Config, sizes: Mapping[str, int]) -> int:
    """Returns a lower bound of the memory of a device: state, batch, and gradients or activations.

    With remat 'off' a layer saves all that the backward pass needs, at least also the outputs of its norms, queries,
    keys, values, the residual sum, and four arrays of the feed-forward network: the results of its two first products,
    of the activation, and of their product. The strategy gather adds the K/V of whole rows.
    """
    call, least = _call(c, sizes), minimum_memory(c, sizes)
    width, tensor, activations = jnp.dtype(call.dtype).itemsize, sizes[TENSOR], least.activations
    if c.model.remat == "off":
        own = 3 * c.model.dim + 4 * c.model.feed_forward // tensor
        if c.model.head_groups == 1:  # groups of heads compute them again
            own += (call.heads + 2 * call.kv_heads) * call.head_dim
        activations += c.model.layers * call.batch * call.queries * own * width
    if c.attention.strategy == "gather":
        activations += call.batch * c.data.seq_len * 2 * call.kv_heads // c.model.head_groups * call.head_dim * width
    return least.state + least.batch + max(least.gradient, activations)
