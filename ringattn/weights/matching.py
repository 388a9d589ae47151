"""Checks that a checkpoint holds exactly the tensors of its model, and lists all differences at once."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from ringattn import config
from ringattn.weights.names import IGNORED, LAYER, Rule
from ringattn.weights.placement import Sizes, stored_names, stored_shape
from ringattn.weights.tensors import Tensor
from ringattn.weights.untrusted import printable

MAX_LISTED = 12
"""Maximum number of names in each list of an error; the layers of one name count once."""
_ROWS = 4096
_LAYER_NUMBER = r"(?<=\.)\d{1,9}(?=\.)"
"""Pattern of the index of a layer in a name. Python does not convert numbers of more than 4300 digits."""


def check_tensors(
    path: Path,
    c: config.Model,
    tensors: Mapping[str, Tensor],
    rules: tuple[Rule, ...],
    sizes: Sizes,
    readable: set[str],
) -> None:
    """Raises ValueError that lists missing, surplus, misshapen and unreadable tensors.

    `readable` are the dtypes that `Tensor.read` accepts.
    """
    if c.layers > len(tensors):
        held = {int(number) for name in tensors for number in re.findall(_LAYER_NUMBER, name)}
        count = f"has {len(tensors)} tensors, of {len(held)} layers" if held else f"has {len(tensors)} tensors"
        raise ValueError(f"{path} {count}, but its config says {c.layers} layers; download the model again")
    expected = {name: stored_shape(rule, sizes) for rule in rules for name in stored_names(rule, c.layers)}
    ignored = {name for name in tensors if _template(name) in IGNORED}
    if c.tied:
        ignored |= _tied_copy(path, tensors, expected)
    surplus = [name for name in tensors if name not in expected and name not in ignored]
    shaped = {name: tensors[name] for name in expected if name in tensors}
    wrong = [
        f"{name} has shape {tensor.shape} instead of {expected[name]}"
        for name, tensor in shaped.items()
        if tensor.shape != expected[name]
    ]
    unreadable = [f"{name} is {tensor.dtype}" for name, tensor in shaped.items() if tensor.dtype not in readable]
    lists = {
        "missing": [name for name in expected if name not in tensors],
        "surplus": surplus,
        "other shapes than the config says": wrong,
        f"dtypes other than {', '.join(sorted(readable))}": unreadable,
    }
    problems = [f"{title}: {_listed(names)}" for title, names in lists.items() if names]
    if problems:
        fix = f"use the config of these weights, or download the model again (family {c.family!r})"
        raise ValueError(f"{path}: its tensors do not match its config; {'; '.join(problems)}; {fix}")


def _tied_copy(path: Path, tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> set[str]:
    """Returns the name of a stored output projection, which must equal the embedding if the config ties both."""
    copy, original = "lm_head.weight", "model.embed_tokens.weight"
    if copy not in tensors or original not in tensors:
        return set()
    one, other = tensors[copy], tensors[original]
    same = one.shape == other.shape == expected[original] and one.dtype == other.dtype
    for begin in range(0, one.shape[0], _ROWS) if same else ():
        rows = slice(begin, begin + _ROWS), slice(None)
        same = same and np.array_equal(one.read(rows), other.read(rows))
    if not same:
        fix = "set tie_word_embeddings to false in config.json, or remove the tensor"
        raise ValueError(f"{path}: {copy} differs from {original}, but config.json ties them; {fix}")
    return {copy}


def _template(name: str) -> str:
    return re.sub(_LAYER_NUMBER, LAYER, name)


def _listed(names: Iterable[str]) -> str:
    """Returns names as text; those that differ only in the layer are listed once: 'layers.[0, 3].mlp (2 layers)'."""
    layers: dict[str, list[str]] = {}
    for name in names:
        layers.setdefault(_template(name), []).extend(re.findall(_LAYER_NUMBER, name)[:1])
    texts = [
        template.replace(LAYER, numbers[0] if len(numbers) == 1 else f"[{_ranges(numbers)}]", 1)
        for template, numbers in ((template, numbers or [""]) for template, numbers in layers.items())
    ]
    more = f" and {len(texts) - MAX_LISTED} more" if len(texts) > MAX_LISTED else ""
    return ", ".join(map(printable, texts[:MAX_LISTED])) + more


def _ranges(numbers: list[str]) -> str:
    """Returns numbers as ranges: '0-3, 7'."""
    ranges: list[list[int]] = []
    for number in sorted(map(int, numbers)):
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ", ".join(f"{first}-{last}" if last > first else str(first) for first, last in ranges)
