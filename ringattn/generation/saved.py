"""Prompt caches, which can be saved and loaded on another number of devices."""

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import ml_dtypes
import numpy as np
from jaxtyping import Array, Int

from ringattn import config
from ringattn.generation import cache as caches
from ringattn.generation.cache import Cache, Store
from ringattn.generation.programs import fingerprint, generation_model, replicated
from ringattn.model.families import layer_kinds
from ringattn.model.parallel import Params
from ringattn.runs.files import complete_directory
from ringattn.weights import check_target
from ringattn.weights.untrusted import file_inside, read_object

if TYPE_CHECKING:
    from ringattn.generation.served import Served

INFORMATION, DATA_FILE = "cache.json", "cache.bin"
FORMAT = 2
_STORED = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16), "int8": np.dtype(np.int8)}
_FIX = "prefill the prompt again, and save it"


@dataclass(frozen=True)
class PromptCache:
    """The cache of a prompt, which answers can share."""

    tokens: Int[np.ndarray, " tokens"]
    """The ids of the prompt."""
    cache: Cache
    """One row on the devices."""
    served: "Served"

    @property
    def bytes_per_device(self) -> int:
        """Number of bytes of keys, values and scales on each device."""
        return caches.bytes_per_device(self.cache)

    def shortened(self) -> "PromptCache":
        """Returns the cache without its last token."""
        lengths = replicated(np.array([self.tokens.size - 1], np.int32), self.served.engine.mesh)
        return replace(self, tokens=self.tokens[:-1], cache=self.cache._replace(lengths=lengths))

    def save(self, path: str | Path) -> None:
        """Writes the cache to the new directory `path`. Layers with a window store what can still be seen.

        Raises ValueError, with a fix, if `path` exists, cannot be written, or if the cache is sharded over processes.
        """
        directory, engine = check_target(path), self.served.engine
        if not self.tokens.size:
            raise ValueError("the cache is empty; prefill a prompt")
        if not all(x.is_fully_addressable for x in jax.tree.leaves(self.cache)):
            raise ValueError("a cache that is sharded over several processes cannot be saved; use one process")
        digest = hashlib.sha256()
        with complete_directory(directory, "free disk space, or use another directory") as temporary:
            with (temporary / DATA_FILE).open("wb") as file:
                for kind, store in sorted(self.cache.stores.items()):
                    kept = kept_tokens(engine.config, kind, self.tokens.size)
                    for layer in range(store.key.shape[0]):
                        for x in store:
                            if x is None:
                                continue
                            content = _natural(np.asarray(x[layer, 0]), engine.shards, self.tokens.size, kept)
                            file.write(content.data)
                            digest.update(content.data)
            digest.update(_token_bytes(self.tokens.tolist()))
            information = {
                "format": FORMAT,
                "model": self.served.key,
                "dtype": engine.cache_dtype,
                "tokens": self.tokens.tolist(),
                "sha256": digest.hexdigest(),
            }
            (temporary / INFORMATION).write_text(json.dumps(information))


def _token_bytes(tokens: list[int]) -> bytes:
    return np.asarray(tokens, "<i4").tobytes()


def kept_tokens(c: config.Model, kind: Any, tokens: int) -> int:
    """Returns the number of last tokens that a saved cache of `tokens` tokens holds, in layers of a kind."""
    return tokens if kind == "full" or c.window is None else min(tokens, c.window + 1)


def _natural(x: np.ndarray, shards: int, tokens: int, kept: int) -> np.ndarray:
    """Returns the last `kept` tokens of x [G, S, ...], in natural order and as bytes."""
    slots = x.shape[1] // shards
    numbers = np.arange(tokens - kept, tokens)
    index = numbers % shards * slots + numbers // shards % slots
    return np.ascontiguousarray(x[:, index]).view(np.uint8)


def load_cache(path: Path, served: "Served") -> PromptCache:
    """Returns a cache that `PromptCache.save` wrote. Raises ValueError: see `Generator.load_cache`."""
    engine = served.engine
    tokens = _read_information(path, served)
    length, mesh = tokens.size, engine.mesh
    capacity = caches.capacity(length, engine.cache_tokens)
    blank = caches.shared(caches.empty(engine.config, mesh.shape["data"], capacity, engine.cache_dtype, mesh))
    position, stores = 0, {}
    for kind, layers in sorted(layer_kinds(engine.config).items()):
        kept = kept_tokens(engine.config, kind, length)
        parts = [x for x in blank.stores[kind] if x is not None]
        sizes = [x.dtype.itemsize * x.shape[2] * kept * (x.shape[4] if x.ndim == 5 else 1) for x in parts]
        placed: list[Array] = []
        offset = position
        for x, size in zip(parts, sizes, strict=True):
            placed.append(_place(path / DATA_FILE, x, offset, sum(sizes), length, kept, engine.shards))
            offset += size
        position += layers * sum(sizes)
        stores[kind] = Store(placed[0], placed[1], *(placed[2:] or (None, None)))
    lengths = replicated(np.array([length], np.int32), mesh)
    return PromptCache(tokens, blank._replace(stores=stores, lengths=lengths), served)


def _place(file: Path, like: Array, offset: int, stride: int, length: int, kept: int, shards: int) -> Array:
    """Returns an array like `like` [layers, 1, G, S, ...] from a file that has layer n at offset + n * stride."""
    layers, _, heads, size, *dims = like.shape
    slots = size // shards

    def part(index: Any) -> np.ndarray:
        shard = (index[3].start or 0) // slots
        last = (length - shard + shards - 1) // shards - 1
        numbers = (last - (last - np.arange(slots)) % slots) * shards + shard
        stored = (numbers >= length - kept) & (numbers >= 0)
        found = np.zeros((layers, 1, len(range(*index[2].indices(heads))), slots, *dims), like.dtype)
        for layer in range(layers):
            mapped = np.memmap(file, np.dtype(like.dtype), "r", offset + layer * stride, (heads, kept, *dims))
            found[layer, 0, :, stored] = np.moveaxis(mapped[index[2]][:, numbers[stored] - (length - kept)], 1, 0)
        return found

    return jax.make_array_from_callback(like.shape, like.sharding, part)


def _read_information(path: Path, served: "Served") -> np.ndarray:
    """Returns the tokens of a saved cache, all of whose bytes are checked."""
    engine = served.engine
    if not path.is_dir():
        raise ValueError(f"{path} is not a directory; use one that PromptCache.save has written")
    file, data = file_inside(path, INFORMATION), file_inside(path, DATA_FILE)
    if file is None or data is None:
        raise ValueError(f"{path} is not a saved cache: it lacks {INFORMATION if file is None else DATA_FILE}; {_FIX}")
    values = read_object(file)
    tokens = values.get("tokens")
    is_list = isinstance(tokens, list) and all(type(token) is int and 0 <= token < 2**31 for token in tokens)
    if values.get("format") != FORMAT or not is_list or not tokens:
        raise ValueError(f"{file} has another format; {_FIX}")
    if values.get("model") != served.key:
        raise ValueError(f"{path} is the cache of another model; load the model that made it, or {_FIX}")
    if values.get("dtype") != engine.cache_dtype:
        stated = values.get("dtype")
        raise ValueError(f"{path} has dtype {stated!r}, not cache_dtype={engine.cache_dtype!r}; load the model with it")
    if len(tokens) > engine.cache_tokens:
        problem = f"has {len(tokens)} tokens, more than cache_tokens={engine.cache_tokens}"
        raise ValueError(f"{path} {problem}; load the model with more cache_tokens")
    with data.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256")
    digest.update(_token_bytes(tokens))
    if digest.hexdigest() != values.get("sha256"):
        raise ValueError(f"{data} is damaged: its SHA-256 is not that of {INFORMATION}; {_FIX}")
    return served.texts.ids(tokens)


def model_key(c: config.Model, params: Params) -> str:
    """Returns a digest of a model and its parameters. Call it under the mesh."""
    section = asdict(generation_model(c, "float32"))
    content = json.dumps([section, fingerprint(params)])
    return hashlib.sha256(content.encode()).hexdigest()[:16]
