"""Loads a checkpoint onto a mesh: a Hugging Face directory, a GGUF file or a run directory."""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import jax
from flax import nnx

from ringattn import config
from ringattn.data import Tokenizer, find_tokenizer
from ringattn.mesh.axes import DATA, abstract, context_shards
from ringattn.mesh.devices import check_divisible, start
from ringattn.model.parallel import Params
from ringattn.runs.directory import find_checkpoint, locate
from ringattn.runs.files import expanded
from ringattn.runs.reading import read_params
from ringattn.weights.chat_template import read_token_ids
from ringattn.weights.loaded import Loaded, make_model
from ringattn.weights.names import letter_sizes
from ringattn.weights.placement import by_path, place_parameter
from ringattn.weights.source import (
    Details,
    Source,
    chat_files,
    is_gguf,
    open_gguf_file,
    open_huggingface,
    read_files,
)
from ringattn.weights.tokenizers import run_files
from ringattn.weights.untrusted import file_inside, read_object

Advance = Callable[[int, int], None]
"""Called with the number of bytes placed or written, and the total number of bytes."""


def load(path: str | Path, mesh: config.Mesh | None = None, advance: Advance = lambda done, total: None) -> Loaded:
    """Loads the model at `path` onto a mesh over all devices.

    Args:
      path: a Hugging Face directory (config.json with safetensors files), a GGUF file, or a run directory or one of its
        checkpoints. The content is not trusted.
      mesh: the mesh section of a config; None: all devices on the context axis. Starts the devices, as a script does,
        unless they are already running.
      advance: called after each shard; process 0 may show a progress bar.

    Raises ValueError, with a fix, if the checkpoint is missing, damaged, contradictory or of an unknown family, or if
    it does not fit the mesh. Names and shapes are checked before any tensor is read.
    """
    given = expanded(path)
    if is_run(given):
        return _load_run(given, mesh or config.Mesh())
    source = open_source(given)
    started = _start(mesh or config.Mesh(), source.model, given)
    params = read_source(source, _abstract_params(source.model, started), advance)
    return Loaded(source.path, source.model, started, params, source.details)


def open_source(path: Path) -> Source:
    """Opens a Hugging Face directory or a GGUF file. Raises ValueError: see `load`."""
    fix = "use a Hugging Face directory, a GGUF file or a run directory"
    try:
        exists, is_file = path.exists(), path.is_file()
    except OSError as error:  # such as a name that is too long
        raise ValueError(f"{path} cannot be opened ({error.strerror}); {fix}") from None
    if not exists:
        raise ValueError(f"{path} does not exist; {fix}")
    if not is_file:
        return open_huggingface(path)
    if not is_gguf(path):
        fix = f"use its directory, {path.parent}, or a .gguf file"
        raise ValueError(f"{path} is a file, but not a GGUF file; {fix}")
    return open_gguf_file(path)


def is_run(path: Path) -> bool:
    """Returns True for a run directory, its directory of checkpoints, or one of its checkpoints."""
    directory, _ = locate(path)
    try:
        file = file_inside(directory, "config.json")
        content = {} if file is None else read_object(file)
    except ValueError:  # which open_source raises again, if the file is needed
        return False
    return {"model", "data", "optimizer"} <= content.keys()


def _start(section: config.Mesh, model: config.Model, path: Path) -> jax.sharding.Mesh:
    """Starts the devices and returns their mesh. Raises ValueError if the model does not fit it."""
    mesh = start(section)
    data, train = config.Data(seq_len=2 * context_shards(mesh)), config.Train(batch_size=mesh.shape[DATA])
    try:
        check_divisible(config.Config(model=model, data=data, train=train), mesh)
    except ValueError as error:
        raise ValueError(f"{path} does not fit this mesh ({error}); use another mesh") from error
    return mesh


@lru_cache(maxsize=4)
def _abstract_params(model: config.Model, mesh: jax.sharding.Mesh) -> Params:
    """Returns the parameters as jax.ShapeDtypeStructs with shardings."""
    with jax.set_mesh(mesh):
        create = make_model(model)
        return abstract(jax.eval_shape(jax.jit(lambda: nnx.split(create())[1])), mesh)


def read_source(source: Source, like: Params, advance: Advance = lambda done, total: None) -> Params:
    """Reads the tensors of a checked source as parameters, placed like `like`: jax.ShapeDtypeStructs with shardings."""
    expected, sizes, placed = by_path(like), letter_sizes(source.model), {}
    total, done = sum(leaf.size * leaf.dtype.itemsize for leaf in expected.values()), 0
    rules = {rule.path: rule for rule in source.rules}
    assert rules.keys() == expected.keys(), rules.keys() ^ expected.keys()
    for path, leaf in expected.items():
        shards = []
        for shard in place_parameter(rules[path], source.tensors, sizes, leaf):
            shards.append(shard)
            done += shard.nbytes
            advance(min(done, total), total)
        placed[path] = jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, shards)
    return jax.tree.unflatten(jax.tree.structure(like), [placed[path] for path in expected])


def _load_run(path: Path, section: config.Mesh) -> Loaded:
    """Loads the checkpoint of a run with its tokenizer."""
    checkpoint = find_checkpoint(path, str(path))
    stage, trained_length = checkpoint.stage()
    tokenizer = find_tokenizer(stage.data, run_directory=checkpoint.directory)
    vocabulary = stage.model.vocabulary or tokenizer.size
    model = replace(stage.model, vocabulary=vocabulary, weights=None)
    mesh = _start(section, model, path)
    params = read_params(checkpoint.directory / "checkpoints", checkpoint.step, _abstract_params(model, mesh))
    return Loaded(path, model, mesh, params, run_details(checkpoint.directory, tokenizer, trained_length), tokenizer)


def run_details(directory: Path, tokenizer: Tokenizer, context: int) -> Details:
    """Returns the files of the run in `directory`, and its token ids: those of the checkpoint that it started from."""
    files = run_files(tokenizer)
    files |= chat_files(read_files(directory)) if files else {}
    token_ids = {"bos_token_id": tokenizer.start, "eos_token_id": tokenizer.boundary}
    return Details(context, token_ids=token_ids | read_token_ids(files, directory), files=files)
