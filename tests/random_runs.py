"""Run directories of small models with random weights, for tests that need no trained model."""

from pathlib import Path

import jax
from flax import nnx

from ringattn import config
from ringattn.data import load_tokenizer
from ringattn.mesh.axes import abstract
from ringattn.mesh.devices import start
from ringattn.model.build import model_factory
from ringattn.runs.checkpoint import Checkpoints

SEQ_LEN = 256


def make_run(directory: Path, text: bytes, scale: float = 20.0) -> Path:
    """Creates the run `directory` of a model of bytes with one layer, and its text `text.txt` next to it.

    The parameters are `scale` times those of the initialization, so that the most likely token is clear. The model has
    ids that its tokenizer lacks, which must never be generated.
    """
    path = directory.parent / "text.txt"
    path.write_bytes(text)
    c = config.Config(
        name=directory.name,
        model=config.Model(layers=1, dim=16, heads=4, kv_heads=2, head_dim=8, feed_forward=32, vocabulary=400),
        data=config.Data(path=str(path), seq_len=SEQ_LEN, validation=0.4),
        mesh=config.Mesh(context=8),
        train=config.Train(steps=1),
        log=config.Log(directory=str(directory.parent)),
    )
    mesh = start(c.mesh)
    with jax.set_mesh(mesh):
        make_model = model_factory(c, load_tokenizer("bytes").size)
        create = jax.jit(lambda: nnx.split(make_model())[1])
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract(jax.eval_shape(create), mesh))
        params = jax.tree.map(lambda leaf, sharding: jax.device_put(scale * leaf, sharding), create(), shardings)
        directory.mkdir()
        (directory / "config.json").write_text(config.to_json(c))
        with Checkpoints(directory / "checkpoints", keep=1) as checkpoints:
            checkpoints.save(1, {"params": params})
            checkpoints.confirm(1)
    return directory
