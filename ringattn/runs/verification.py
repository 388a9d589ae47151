"""Verifies checkpoints: shapes and checksums of their arrays, and errors that are evidence of damage."""

import errno
import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from ringattn.units import first_line

Arrays = dict[str, Any]
"""Arrays, or jax.ShapeDtypeStructs, by path, such as 'params.layers.attention.query'."""
Facts = dict[str, Any]
"""The `shapes` and checksums (`sums`) of the arrays of a checkpoint, with a `digest` of both."""

_MISSING = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR)


def named(tree: Any) -> Arrays:
    """Returns the leaves of `tree` by path, in tree order."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def shapes(arrays: Arrays) -> dict[str, list[int]]:
    return {name: list(array.shape) for name, array in arrays.items()}


@jax.jit
def _is_finite(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: jnp.isfinite(array).all() for name, array in arrays.items()}


def non_finite(arrays: dict[str, jax.Array]) -> list[str]:
    """Returns the names of the arrays that contain NaN or infinity."""
    return [name for name, finite in jax.device_get(_is_finite(arrays)).items() if not finite]


_MULTIPLIERS = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F)
"""Odd numbers, one per dim (again from the first after the last)."""


@jax.jit
def _bit_sum(array: jax.Array) -> jax.Array:
    array = jax.device_put(array, jax.memory.Space.Device)  # moments may be in host memory
    bits = jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{8 * array.dtype.itemsize}")).astype(jnp.uint32)
    weight = jnp.zeros_like(bits)
    for dim in range(array.ndim):
        multiplier = jnp.uint32(_MULTIPLIERS[dim % len(_MULTIPLIERS)])
        weight += multiplier * jax.lax.broadcasted_iota(jnp.uint32, array.shape, dim)
    return jnp.sum(bits * (2 * weight + 1), dtype=jnp.uint32)  # odd weights: every changed element changes the sum


def _checksums(arrays: dict[str, jax.Array]) -> dict[str, int]:
    """Returns the weighted sum of each array's bit patterns modulo 2**32, which does not depend on the mesh.

    The weights depend on the position, so that exchanged parts of an array change the sum. Each sum is awaited: arrays
    are copied from host memory one at a time, and on CPU, programs of several processes must not run at the same time.
    """
    return {name: int(_bit_sum(array)) for name, array in arrays.items()}


def facts(arrays: dict[str, jax.Array]) -> Facts:
    """Returns the facts that are stored with `arrays`."""
    content = {"shapes": shapes(arrays), "sums": _checksums(arrays)}
    return content | {"digest": _digest(content)}


def check_facts(stored: Facts) -> None:
    """Raises ValueError if the `digest` of `stored` does not match its content."""
    if stored["digest"] != _digest({name: stored[name] for name in ("shapes", "sums")}):
        raise ValueError("the checksum of its metadata differs")


def check_arrays(arrays: dict[str, jax.Array], sums: dict[str, int]) -> None:
    """Raises ValueError if a checksum differs from `sums`."""
    changed = [name for name, value in _checksums(arrays).items() if value != sums[name]]
    if changed:
        raise ValueError(f"the checksum of {changed[0]} differs")


def difference(stored: Facts, target: Arrays) -> str:
    """Returns a message that names the first array whose shape differs, both shapes and a fix."""
    found, expected = stored["shapes"], shapes(target)
    name = next(name for name in [*expected, *found] if found.get(name) != expected.get(name))
    fix = "restore the config's model and data sections, or start a new run with another --name"
    stored_shape, shape = found.get(name, "missing"), expected.get(name, "missing")
    return f"the shape of {name} is {stored_shape} in the checkpoint but {shape} in the config's model; {fix}"


def _digest(content: Facts) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def is_damage(error: Exception) -> bool:
    """Returns True if a read error shows that files are damaged: missing, changed or not parsable.

    Other errors of the operating system, and a lack of memory, are no evidence: reading again may succeed.
    """
    for each in _causes(error):
        number = each.errno if isinstance(each, OSError) else _os_error(str(each))
        transient = number is not None and number not in _MISSING
        if transient or isinstance(each, MemoryError | TimeoutError | jax.errors.JaxRuntimeError):
            return False
    return True


def reason(error: Exception) -> str:
    """Returns the cause of an error of reading or writing, as the operating system's message if it has one."""
    for each in _causes(error):
        if isinstance(each, OSError) and each.strerror:
            return each.strerror
        if (number := _os_error(str(each))) is not None:
            return os.strerror(number)
        if isinstance(each, MemoryError):
            return "out of memory"
        if isinstance(each, jax.errors.JaxRuntimeError):
            return first_line(each)
    # The message of TensorStore ends with the cause and then a description of the array in brackets.
    message, *description = str(error).split(" [tensorstore_spec", 1)
    return message.rsplit(": ", 1)[-1] if description else first_line(error)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _os_error(message: str) -> int | None:
    """Returns the number in a TensorStore message, such as '... [os_error_code='5'] ...'."""
    found = re.search(r"\[os_error_code='(\d+)'\]", message)
    return int(found[1]) if found else None


def remove_undecodable(description: Path) -> None:
    """Removes a JSON file that is nested too deeply. Orbax does without it, but raises RecursionError if it exists."""
    try:
        json.loads(description.read_bytes())
    except RecursionError:
        description.unlink(missing_ok=True)
    except (OSError, ValueError):
        pass  # Orbax continues
