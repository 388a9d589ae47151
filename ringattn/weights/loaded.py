"""A model on devices: its config, parameters, tokenizer and logits."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from ringattn import config
from ringattn.data import Tokenizer
from ringattn.data.file_tokenizer import FileTokenizer
from ringattn.data.placement import permute_and_place
from ringattn.layout import unpermute
from ringattn.mesh.axes import DATA, context_shards
from ringattn.model.build import MakeModel, model_factory
from ringattn.model.parallel import Params
from ringattn.weights.placement import check_addressable
from ringattn.weights.source import Details
from ringattn.weights.tokenizers import TextTokenizer

LAYOUT = "zigzag"
_PADDING = -1
"""Segment id of padding, which attention ignores."""


@dataclass(frozen=True)
class Loaded:
    """A model whose parameters are on the devices of a mesh."""

    path: Path
    """The directory or file that it was loaded from."""
    config: config.Model
    """Shape and family of the model. The vocabulary is set."""
    mesh: jax.sharding.Mesh
    params: Params
    """float32, sharded over the mesh: see `model/parallel.py`."""
    details: Details
    run_tokenizer: Tokenizer | None = None
    """The tokenizer of a run. Other checkpoints have theirs in `details`."""

    @cached_property
    def tokenizer(self) -> TextTokenizer:
        """The tokenizer. Raises ValueError if the checkpoint has none, or one that would lose text."""
        if self.run_tokenizer is not None:
            return TextTokenizer(self.run_tokenizer)
        if "tokenizer.json" not in self.details.files:
            raise ValueError(self.details.no_tokenizer)
        name = str(self.path / "tokenizer.json" if self.path.is_dir() else self.path)
        return TextTokenizer(FileTokenizer(name, self.details.files["tokenizer.json"]))

    def logits(
        self, tokens: Int[np.ndarray, "B L"], segment_ids: Int[np.ndarray, "B L"] | None = None
    ) -> Float[np.ndarray, "B L V"]:
        """Returns the float32 next-token logits of `tokens`, computed in float32 on a zigzag ring over the mesh.

        Args:
          tokens: integers, in natural order. Any B and L: rows and tokens are padded to what the mesh needs. Programs
            are compiled per padded shape.
          segment_ids: equal ids of neighbours are one document. Tokens attend within their document, and positions are
            counted from its start. None: each row is one document.

        Raises ValueError for arrays of another shape, for ids outside the vocabulary, and if the parameters are sharded
        over several processes.
        """
        check_addressable(self.params, "Loaded.logits")
        tokens = np.asarray(tokens)
        if tokens.ndim != 2 or not tokens.size or tokens.dtype.kind not in "iu":
            raise ValueError(f"tokens {tokens.dtype}{tokens.shape} must be integers [B, L]; use an int32 array")
        if segment_ids is not None and np.shape(segment_ids) != tokens.shape:
            problem = f"segment_ids {np.shape(segment_ids)} must have the shape of tokens {tokens.shape}"
            raise ValueError(f"{problem}; use one id per token")
        vocabulary = self.config.vocabulary or 0
        outside = tokens[(tokens < 0) | (tokens >= vocabulary)]
        if outside.size:
            rule = f"must be from 0 to {vocabulary - 1}, the vocabulary of the model"
            raise ValueError(f"token id {outside[0]} {rule}; use the tokenizer of the model")
        segments, positions = _documents(segment_ids, tokens.shape)
        padding = [(0, -size % unit) for size, unit in zip(tokens.shape, self._units, strict=True)]
        padded = [
            np.pad(array.astype(np.int32), padding, constant_values=fill)
            for array, fill in ((tokens, 0), (positions, 0), (segments, _PADDING))
        ]
        with jax.set_mesh(self.mesh):
            found = _logits_program(self.config, self.mesh)(self.params, *permute_and_place(padded, self.mesh, LAYOUT))
            logits = np.asarray(jax.device_get(found))
        natural = unpermute(logits, LAYOUT, context_shards(self.mesh))
        return natural[: tokens.shape[0], : tokens.shape[1]]

    @property
    def _units(self) -> tuple[int, int]:
        """Numbers that the rows and tokens of a batch must be multiples of."""
        return self.mesh.shape[DATA], 2 * context_shards(self.mesh)


def make_model(c: config.Model) -> MakeModel:
    """Returns a function that creates the model, computing in float32 on a zigzag ring. Call it under a mesh."""
    assert c.vocabulary is not None
    model = replace(c, dtype="float32", remat="off", head_groups=1)
    attention = config.Attention(layout=LAYOUT, strategy="ring")
    return model_factory(config.Config(model=model, attention=attention), c.vocabulary)


@lru_cache(maxsize=4)
def _logits_program(c: config.Model, mesh: jax.sharding.Mesh) -> Callable[..., Array]:
    """Returns a jitted function that computes logits. Models of the same shape share it. Call it under `mesh`."""
    graphdef = nnx.graphdef(nnx.eval_shape(make_model(c)))

    @jax.jit
    def logits(params: Params, tokens: Array, positions: Array, segment_ids: Array) -> Array:
        return nnx.merge(graphdef, params).logits(tokens, positions, segment_ids)

    return logits


def _documents(segment_ids: np.ndarray | None, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Returns segment ids from 0, different for each document of a row, and positions within the documents."""
    indices = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    if segment_ids is None:
        return np.zeros(shape, np.int32), indices
    starts = np.ones(shape, bool)
    starts[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    first = np.maximum.accumulate(np.where(starts, indices, 0), axis=1)
    return np.cumsum(starts, axis=1, dtype=np.int32) - np.int32(1), indices - first
