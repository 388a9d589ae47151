"""Scans layers of several kinds, whose parameters are stacked in one array per name.

Consecutive layers of one kind are one `lax.scan`. The repetitions of the pattern are an outer scan, so the program
contains each run of the pattern once, whatever the number of layers:

    window window full window window full window     pattern (window, window, full), 7 layers
    scan of 2 groups (scan of 2 windows, 1 full), 1 window

A layer reads its parameters from the stacks by its index. Slices of the stacks per group and for the remainder would
be copies, and so would the concatenation of their gradients.
"""

from collections.abc import Callable
from itertools import groupby
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from ringattn.config.choices import LayerKind
from ringattn.model.parallel import Params

LayerFunction = Callable[[Float[Array, "B L E"], Params], tuple[Float[Array, "B L E"], None]]
"""Applies one layer with its parameters: the body of a scan."""

Transform = Callable[[Callable[..., Any]], Callable[..., Any]]
Carry = TypeVar("Carry")

GROUP = 4
"""Maximum number of layers of one kind in a group."""


def group_size(layers: int, pattern: int) -> int:
    """Returns the layers of a group, see `scan_layers`, for a pattern of length `pattern`."""
    return max(size for size in range(1, GROUP + 1) if layers % size == 0) if pattern == 1 else pattern


class Place(NamedTuple):
    """The kind of a layer, and its rank among the layers of its kind."""

    kind: LayerKind
    rank: Int[Array, ""]


def scan_layers(
    layer: Callable[[LayerKind], LayerFunction],
    x: Float[Array, "B L E"],
    params: Params,
    pattern: tuple[LayerKind, ...],
    remat: Transform,
    remat_group: Transform | None = None,
) -> Float[Array, "B L E"]:
    """Returns `x` after all layers. `params` are stacked along dim 0; layer i has kind pattern[i % len(pattern)].

    `layer(kind)` returns the function of the layers of that kind. `remat` is `jax.checkpoint` with its options, for a
    layer, and `remat_group` for a group of layers: at most GROUP of one kind, as many as divide their number, or a
    repetition of the pattern. The input of a group is named "group_input".
    """
    layers = jax.tree.leaves(params)[0].shape[0]
    kinds: tuple[LayerKind, ...] = tuple(pattern[index % len(pattern)] for index in range(layers))
    if len(set(kinds)) == 1:
        return _scan_one_kind(layer(kinds[0]), x, params, remat, remat_group)
    stacks = lax.stop_gradient(params)

    def apply(kind: LayerKind):
        def read_and_apply(carry, index):
            x, gradients = carry
            values, gradients = _read(gradients, stacks, index)
            return (layer(kind)(x, values)[0], gradients), None

        return remat(read_and_apply)

    def apply_run(carry, first, kinds):
        for kind, run in groupby(kinds):
            length = len(list(run))
            carry, _ = lax.scan(apply(kind), carry, first + jnp.arange(length))
            first = first + length
        return carry

    def repetition(carry, start):
        x, gradients = carry
        return apply_run((checkpoint_name(x, "group_input"), gradients), start, pattern), None

    repetitions = layers // len(pattern)
    carry, first = (x, params), 0
    if repetitions > 1:
        first = repetitions * len(pattern)
        starts = len(pattern) * jnp.arange(repetitions)
        carry, _ = lax.scan(remat_group(repetition) if remat_group else repetition, carry, starts)
    return apply_run(carry, first, kinds[first:])[0]


def _scan_one_kind(
    layer: LayerFunction,
    x: Float[Array, "B L E"],
    params: Params,
    remat: Transform,
    remat_group: Transform | None,
) -> Float[Array, "B L E"]:
    if remat_group is None:
        return lax.scan(remat(layer), x, params)[0]
    size = group_size(jax.tree.leaves(params)[0].shape[0], 1)

    def group(x, params):
        return lax.scan(remat(layer), checkpoint_name(x, "group_input"), params)[0], None

    groups = jax.tree.map(lambda stack: stack.reshape(-1, size, *stack.shape[1:]), params)
    return lax.scan(remat_group(group), x, groups)[0]


def fold_layers(
    layer: Callable[[Carry, Any, Place], Carry], carry: Carry, params: Any, pattern: tuple[LayerKind, ...]
) -> Carry:
    """Returns `carry` after layer(carry, params of the layer, place) for all layers, without gradients.

    `params` is a tree of stacks of all layers, and `pattern` that of `scan_layers`. Loops over its repetitions.
    """
    layers = jax.tree.leaves(params)[0].shape[0]
    counts = {kind: pattern.count(kind) for kind in pattern}
    ranks = [pattern[:position].count(kind) for position, kind in enumerate(pattern)]

    def repetition(carry: Carry, number: Int[Array, ""], kinds: tuple[LayerKind, ...]) -> Carry:
        for position, kind in enumerate(kinds):
            index, rank = number * len(pattern) + position, number * counts[kind] + ranks[position]
            carry = layer(carry, _row(params, index), Place(kind, rank))
        return carry

    repetitions = layers // len(pattern)
    if repetitions:
        carry = lax.fori_loop(0, repetitions, lambda number, carry: repetition(carry, number, pattern), carry)
    return repetition(carry, jnp.int32(repetitions), pattern[: layers % len(pattern)])


def _row(stacks: Any, index: Int[Array, ""]) -> Any:
    """Returns the parameters of layer `index`."""
    return jax.tree.map(lambda stack: lax.dynamic_index_in_dim(stack, index, keepdims=False), stacks)


def _read_forward(gradients: Params, stacks: Params, index: Int[Array, ""]) -> tuple[tuple[Any, Params], Array]:
    return (_row(stacks, index), gradients), index


@jax.custom_vjp
def _read(gradients: Params, stacks: Params, index: Int[Array, ""]) -> tuple[Any, Params]:
    """Returns the parameters of layer `index`, and `gradients`.

    Differentiates with respect to `gradients`, which every layer must pass to the next. The gradient of a layer's
    parameters is written to its row of the gradient of `gradients`.
    """
    # `_read_forward` does not call `_read`: rematerialization would repeat that call and save `gradients` per layer.
    return _read_forward(gradients, stacks, index)[0]


def _read_backward(index: Int[Array, ""], cotangents: tuple[Any, Params]):
    def write(row, stack):
        return lax.dynamic_update_index_in_dim(stack, row, index, 0)

    return jax.tree.map(write, *cotangents), None, None


_read.defvjp(_read_forward, _read_backward)
