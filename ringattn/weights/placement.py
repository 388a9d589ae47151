"""Places stored tensors on devices as parameters, shard by shard, and turns parameters into stored tensors.

The host holds one shard of one parameter at a time, or one tensor when it writes. A stored tensor is mapped into memory
only while a part of it is read.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float

from ringattn.runs.verification import named
from ringattn.weights.names import LAYER, Rule
from ringattn.weights.tensors import Tensor

Sizes = Mapping[str, int]
"""Size of each letter in the patterns: see `names.letter_sizes`."""


def by_path(params: Any) -> dict[str, Any]:
    """Returns the leaves of a model's parameters by path, such as 'layers.attention.query', in tree order."""
    return {name.removesuffix(".value"): leaf for name, leaf in named(params).items()}  # of nnx.Param


def check_addressable(params: Any, action: str) -> None:
    """Raises ValueError unless this process has all shards of all parameters. `action` is named in the message."""
    if not all(leaf.is_fully_addressable for leaf in by_path(params).values()):
        problem = f"{action} needs all shards of the parameters, but other processes have some of them"
        raise ValueError(f"{problem}; load the model in a single process")


def stored_shape(rule: Rule, sizes: Sizes) -> tuple[int, ...]:
    """Returns the shape of a stored tensor of `rule`."""
    return tuple(math.prod(sizes[letter] for letter in group) for group in _groups(rule.pattern.split("->")[0]))


def stored_names(rule: Rule, layers: int) -> list[str]:
    """Returns the names of the tensors of `rule`: one, or one per layer."""
    return [rule.name.format(layer) for layer in range(layers)] if LAYER in rule.name else [rule.name]


def place_parameter(
    rule: Rule, tensors: Mapping[str, Tensor], sizes: Sizes, like: Any
) -> Iterator[Float[Array, "..."]]:
    """Yields the shards of the parameter that `rule` stores, each on its device: see `assemble`.

    `like` gives shape and sharding. Rows of the vocabulary that are not stored are 0.
    """
    stacked = LAYER in rule.name
    for device, index in like.sharding.addressable_devices_indices_map(like.shape).items():
        bounds = [each.indices(size)[:2] for each, size in zip(index, like.shape, strict=True)]
        shard = np.zeros([end - begin for begin, end in bounds], np.float32)
        layers = range(*bounds[0]) if stacked else [0]
        for layer, part in zip(layers, shard if stacked else [shard], strict=True):
            read = _read_part(rule, tensors[rule.name.format(layer)], bounds[stacked:], sizes)
            part[tuple(map(slice, read.shape))] = read
        # Without waiting, the host would hold several shards at once.
        yield jax.block_until_ready(jax.device_put(shard, device))


def _read_part(rule: Rule, tensor: Tensor, bounds: list[tuple[int, int]], sizes: Sizes) -> Float[np.ndarray, "..."]:
    """Reads the part within the `bounds` of the dims of one layer's parameter; fewer rows where the vocabulary ends."""
    stored, dims = map(_groups, rule.pattern.split("->"))
    wanted = {dim[0]: each for dim, each in zip(dims, bounds, strict=True) if len(dim) == 1}
    index = []
    for first, *inner in stored:  # a range of the first letter of a group is a range of rows
        begin, end = (min(each, sizes[first]) for each in wanted.pop(first, (0, sizes[first])))
        size = math.prod(sizes[letter] for letter in inner)
        index.append(slice(begin * size, end * size))
    inner_sizes = {letter: sizes[letter] for _, *inner in stored for letter in inner}
    part = rearrange(tensor.read(tuple(index)), rule.pattern, **inner_sizes)
    part = part[tuple(slice(*wanted.get(dim[0], (None,))) for dim in dims)]
    return part + np.float32(rule.offset) if rule.offset else part


def stored_tensors(rule: Rule, parameter: Array, sizes: Sizes) -> Iterator[Float[np.ndarray, "..."]]:
    """Yields the tensors that `rule` stores of a parameter, one per layer: the inverse of `place_parameter`.

    All shards of the parameter must be on devices of this process: see `check_addressable`.
    """
    shards = [(shard.index, jax.device_get(shard.data)) for shard in parameter.addressable_shards]  # views on a CPU
    left, right = rule.pattern.split("->")
    for layer in range(parameter.shape[0]) if LAYER in rule.name else [None]:
        whole = np.empty(parameter.shape[(layer is not None) :], np.float32)
        for index, data in shards:
            whole[index if layer is None else index[1:]] = data if layer is None else data[layer]
        stored = rearrange(whole, f"{right} -> {left}", **{letter: sizes[letter] for letter in _merged(right)})
        yield stored[tuple(map(slice, stored_shape(rule, sizes)))] - np.float32(rule.offset)


def _merged(side: str) -> list[str]:
    """Returns the letters in groups of several, except for the first of each group."""
    return [letter for _, *inner in _groups(side) for letter in inner]


def _groups(side: str) -> list[list[str]]:
    """Returns the groups of letters on one side of a pattern: '(H D) E' -> [[H, D], [E]]."""
    return [words.strip("()").split() for words in re.findall(r"\([^)]*\)|\w+", side)]
