"""Permutes batches to a layout, places them on a mesh, and returns results in natural order."""

from collections.abc import Sequence

import jax
import numpy as np
from jax import P
from jaxtyping import Array, Bool, Shaped

from ringattn.data.packing import Batch
from ringattn.layout import permute, unpermute
from ringattn.mesh.axes import TOKENS, context_shards, place


def permute_and_place(
    arrays: Sequence[Shaped[np.ndarray, "B L"]], mesh: jax.sharding.Mesh, layout: str
) -> list[Shaped[Array, "B L"]]:
    """Permutes per-token arrays from natural order to `layout` and shards them over the mesh."""
    return place([permute(x, layout, context_shards(mesh)) for x in arrays], mesh, TOKENS)


def place_batch(batch: Batch, mesh: jax.sharding.Mesh, layout: str, microbatches: int) -> Batch:
    """Permutes a host batch [B, L] to `layout` and places it on the mesh as [microbatches, B / microbatches, L]."""

    def permuted(x: np.ndarray) -> np.ndarray:
        return permute(x, layout, context_shards(mesh)).reshape(microbatches, -1, x.shape[1])

    return place(jax.tree.map(permuted, batch), mesh, P(None, *TOKENS))


def needed_tokens(
    shape: tuple[int, int], mesh: jax.sharding.Mesh, layout: str, microbatches: int
) -> Bool[np.ndarray, "B L"] | None:
    """Returns True for the tokens that `place_batch` places on devices of this process, of a batch of `shape` [B, L].

    Returns None if these are all tokens.
    """
    rows, length = shape
    sharding = jax.NamedSharding(mesh, P(None, *TOKENS))
    parts = sharding.addressable_devices_indices_map((microbatches, rows // microbatches, length))
    needed = np.zeros((microbatches, rows // microbatches, length), bool)
    for part in parts.values():
        needed[part] = True
    return None if needed.all() else unpermute(needed.reshape(shape), layout, context_shards(mesh))


def read_rows(x: Shaped[Array, "A B L"], mesh: jax.sharding.Mesh, layout: str) -> Shaped[np.ndarray, "rows L"]:
    """Returns a replicated per-token result as NumPy [A * B, L] in natural order. Waits for the devices."""
    rows = np.asarray(jax.device_get(x)).reshape(-1, x.shape[-1])
    return unpermute(rows, layout, context_shards(mesh))
