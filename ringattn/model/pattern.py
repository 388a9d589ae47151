"""Scans layers of several kinds, whose parameters are stacked in one array per name.

Consecutive layers of one kind are one `lax.scan`. The repetitions of the pattern are an outer scan, so the program
contains each run of the pattern once, whatever the number of layers:

    window window full window window full window     pattern (window, window, full), 7 layers
    scan of 2 groups (scan of 2 windows, 1 full), 1 window
"""

from collections.abc import Callable
from itertools import groupby
from typing import Any

import jax
from jax import lax
from jaxtyping import Array, Float

from ringattn.config.choices import LayerKind
from ringattn.model.parallel import Params

LayerFunction = Callable[[Float[Array, "B L E"], Params], tuple[Float[Array, "B L E"], None]]
"""Applies one layer with its parameters: the body of a scan."""


def scan_layers(
    layer: Callable[[LayerKind], LayerFunction],
    x: Float[Array, "B L E"],
    params: Params,
    pattern: tuple[LayerKind, ...],
) -> Float[Array, "B L E"]:
    """Returns `x` after all layers. `params` are stacked along dim 0; layer i has kind pattern[i % len(pattern)].

    `layer(kind)` returns the function of the layers of that kind.
    """
    layers = jax.tree.leaves(params)[0].shape[0]
    kinds: tuple[LayerKind, ...] = tuple(pattern[index % len(pattern)] for index in range(layers))
    repetitions = layers // len(pattern)
    if len(set(kinds)) == 1 or repetitions < 2:
        return _apply(layer, x, params, kinds)
    grouped = repetitions * len(pattern)
    # Splits dim 0, which is not sharded, into repetitions and layers of the pattern.
    groups = jax.tree.map(lambda leaf: leaf[:grouped].reshape(repetitions, len(pattern), *leaf.shape[1:]), params)
    x, _ = lax.scan(lambda x, params: (_apply(layer, x, params, pattern), None), x, groups)
    return _apply(layer, x, _slice(params, grouped, layers), kinds[grouped:])


def _apply(
    layer: Callable[[LayerKind], LayerFunction],
    x: Float[Array, "B L E"],
    params: Params,
    kinds: tuple[LayerKind, ...],
) -> Float[Array, "B L E"]:
    """Returns `x` after the layers of `params`, each run of one kind in a scan."""
    first = 0
    for kind, run in groupby(kinds):
        last = first + len(list(run))
        x, _ = lax.scan(layer(kind), x, _slice(params, first, last))
        first = last
    return x


def _slice(params: Params, first: int, last: int) -> Any:
    """Returns the parameters of layers `first` to `last`."""
    return jax.tree.map(lambda leaf: leaf if (first, last) == (0, leaf.shape[0]) else leaf[first:last], params)
