"""The memory of the backward Pallas kernel for TPUs: the arrays that it reads and writes, and its tiles of them."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from ringattn.attn.kernels.tpu_tiles import LANES, Ref, Scalar, SideSpec, ids_row, row_and_group

SLOTS = 3
"""Tiles of queries in VMEM: one that is fetched, one in use, and one whose gradients are written back."""


class Inputs(NamedTuple):
    """References that the kernel reads: the grid step's tile of keys and values; arrays of queries, in HBM."""

    query: Ref  # [B, G, R, L, D]
    d_out: Ref  # [B, G, R, L, Dv]
    lse: Ref  # [B, G, R, L]
    delta: Ref  # [B, G, R, L]
    q_ids: Ref  # None, or [rows, ids, L]
    key: Ref  # [keys, D]
    value: Ref  # [keys, Dv]
    kv_ids: Ref  # None, or [ids, keys]
    carry: Ref  # None, or [B, G, R, L, D], the same memory as the gradients of the queries


class Grads(NamedTuple):
    """References that the kernel writes: gradients of queries, in HBM, of the grid step's keys, and of the slopes."""

    query: Ref  # [B, G, R, L, D], float32; if they are rounded, only sums that are not complete yet
    rounded: Ref  # None, or [B, G, R, L, D] in the dtype of the queries: complete sums
    key: Ref  # [keys, D]
    value: Ref  # [keys, Dv]
    slopes: Ref  # None, or [R, queries]: sums over the queries at the same place in their tile


class Scratch(NamedTuple):
    """SLOTS tiles of queries, and the ids of the grid step's keys as columns."""

    query: Ref
    d_out: Ref
    lse: Ref
    delta: Ref
    q_ids: Ref  # or None
    d_query: Ref
    fetched: Ref
    written: Ref
    kv_ids: Ref  # or None


def specs(inputs: Inputs, sizes: tuple[int, int], rounded: bool, slopes: bool) -> tuple[Inputs, Grads]:
    """Returns the tiles of a grid step. Arrays of queries stay in HBM."""
    (_, groups, heads, *_), kv_heads, (q_size, kv_size) = inputs.query.shape, inputs.key.shape[1], sizes
    hbm = pl.BlockSpec(memory_space=pl.ANY)

    def kv_tile(dim: int, sharing: int) -> pl.BlockSpec:
        def index(n: Scalar, j: Scalar, *_: Ref) -> tuple[Scalar | int, ...]:
            row, group = row_and_group(n, groups)
            return row, lax.div(group, jnp.int32(sharing)), j, 0

        return pl.BlockSpec((None, None, kv_size, dim), index)

    def ids_tile(ids: Array) -> pl.BlockSpec:
        shape = None, ids.shape[1], kv_size
        return pl.BlockSpec(shape, lambda n, j, *_: (ids_row(ids, row_and_group(n, groups)[0]), 0, j))

    key_dim, value_dim = inputs.key.shape[3], inputs.value.shape[3]
    in_specs = Inputs(
        query=hbm,
        d_out=hbm,
        lse=hbm,
        delta=hbm,
        q_ids=None if inputs.q_ids is None else hbm,
        key=kv_tile(key_dim, groups // kv_heads),
        value=kv_tile(value_dim, groups // kv_heads),
        kv_ids=None if inputs.kv_ids is None else ids_tile(inputs.kv_ids),
        carry=None if inputs.carry is None else hbm,
    )
    slopes_tile = pl.BlockSpec((None, None, heads, q_size), lambda n, *_: (*row_and_group(n, groups), 0, 0))
    return in_specs, Grads(
        query=hbm,
        rounded=hbm if rounded else None,
        key=kv_tile(key_dim, 1),
        value=kv_tile(value_dim, 1),
        slopes=slopes_tile if slopes else None,
    )


def scratch_tiles(inputs: Inputs, q_spec: SideSpec, kv_spec: SideSpec) -> Scratch:
    """Returns the shapes of the kernel's own memory."""
    slots = SLOTS, inputs.query.shape[2], q_spec.size
    return Scratch(
        query=pltpu.VMEM((*slots, inputs.query.shape[4]), inputs.query.dtype),
        d_out=pltpu.VMEM((*slots, inputs.d_out.shape[4]), inputs.d_out.dtype),
        lse=pltpu.VMEM(slots, jnp.float32),
        delta=pltpu.VMEM(slots, jnp.float32),
        q_ids=None if inputs.q_ids is None else pltpu.VMEM((SLOTS, q_spec.ids, q_spec.size), jnp.int32),
        d_query=pltpu.VMEM((*slots, inputs.query.shape[4]), jnp.float32),
        fetched=pltpu.SemaphoreType.DMA((SLOTS, 6)),
        written=pltpu.SemaphoreType.DMA((SLOTS,)),
        kv_ids=None if inputs.kv_ids is None else pltpu.VMEM((kv_spec.ids, kv_spec.size, LANES), jnp.int32),
    )
