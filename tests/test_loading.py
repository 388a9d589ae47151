"""Loads runs and checks the memory of loading."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from gguf_models import write_gguf
from make_family_logits import DIRECTORY

from ringattn import config, weights
from ringattn.evaluation.subject import find_subjects
from ringattn.runs.checkpoint import Checkpoints
from ringattn.weights.huggingface_config import write_config
from ringattn.weights.loading import _abstract_params
from ringattn.weights.names import HUGGING_FACE, letter_sizes, rules
from ringattn.weights.placement import stored_names, stored_shape
from ringattn.weights.safetensors_files import write_file
from ringattn.weights.source import Details

MESH = config.Mesh(simulate=8)
GIB = 2**30


def test_a_run_becomes_a_hugging_face_directory(tmp_path):
    """A run with the tokenizer 'bytes', whose vocabulary of 257 is padded to 384 rows."""
    model = config.Model(layers=2, dim=16, heads=2, kv_heads=1, head_dim=8, feed_forward=24, window=9)
    run = config.Config(
        name="small",
        model=replace(model, weights="a model that is gone", rope_original=64),
        data=config.Data(seq_len=96),
        log=config.Log(directory=str(tmp_path)),
    )
    loaded = weights.load(DIRECTORY / "mistral", MESH)
    like = _abstract_params(replace(model, vocabulary=257), loaded.mesh)
    generator = np.random.default_rng(0)

    def random(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        return jax.device_put(generator.standard_normal(leaf.shape, np.float32), leaf.sharding)

    params = jax.tree.map(random, like)
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "config.json").write_text(config.to_json(run))
    with jax.set_mesh(loaded.mesh), Checkpoints(tmp_path / "small" / "checkpoints", keep=1) as checkpoints:
        checkpoints.save(7, {"params": params, "step": jax.numpy.int32(7)})
        checkpoints.confirm(7)
    for path in (tmp_path / "small", tmp_path / "small" / "checkpoints" / "7"):
        found = weights.load(path, MESH)
        assert found.config == replace(model, vocabulary=257, rope_original=64)
        jax.tree.map(np.testing.assert_array_equal, found.params, params)
    assert found.tokenizer.encode("\u00e9").tolist() == [0xC3, 0xA9]
    weights.save(found, tmp_path / "saved")
    written = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert (written["vocab_size"], written["sliding_window"], written["max_position_embeddings"]) == (257, 10, 96)
    assert written["eos_token_id"] == 256
    again = weights.load(tmp_path / "saved", MESH)
    assert again.config == replace(found.config, family="mistral", pattern=("window",), rope_original=8192)
    rows = {"embedding": 257}  # padding rows of the vocabulary are not stored
    for path, leaf in jax.tree_util.tree_leaves_with_path(jax.device_get(again.params)):
        name = jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
        original = jax.device_get(dict(jax.tree_util.tree_leaves_with_path(params))[path])
        np.testing.assert_array_equal(leaf[: rows.get(name)], original[: rows.get(name)])
    with pytest.raises(ValueError, match=r"has no tokenizer\.json, but the tokenizer 'bytes'"):
        weights.save_run(found, tmp_path / "run")
    with pytest.raises(ValueError, match="has no checkpoint 8; use one of 7"):
        weights.load(tmp_path / "small" / "checkpoints" / "8", MESH)


def test_a_model_becomes_a_run(tmp_path):
    """scripts/eval.py finds the run, and loading it again gives the same model."""
    pytest.importorskip("tokenizers")
    write_gguf(DIRECTORY / "gemma2", tmp_path / "model.gguf")
    loaded = weights.load(tmp_path / "model.gguf", MESH)
    weights.save_run(loaded, tmp_path / "runs" / "gemma")
    (subject,) = find_subjects(config.Evaluation(runs=(str(tmp_path / "runs" / "gemma"),)))
    assert (subject.name, subject.origin.context, subject.stage.model) == ("gemma", 64, loaded.config)
    assert subject.tokenizer.encode(b"ab").tolist() == [42]
    again = weights.load(tmp_path / "runs" / "gemma", MESH)
    assert again.config == loaded.config
    jax.tree.map(np.testing.assert_array_equal, again.params, loaded.params)
    weights.save(again, tmp_path / "saved")
    written = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert written["eos_token_id"] == loaded.details.token_ids["eos_token_id"] != subject.tokenizer.boundary
    settings = (tmp_path / "saved" / "tokenizer_config.json").read_bytes()
    assert settings == loaded.details.files["tokenizer_config.json"]


def test_shards_of_other_processes_are_an_error(tmp_path):
    """Without the check, their part of a written tensor would be uninitialized memory."""
    elsewhere = replace(weights.load(DIRECTORY / "llama", MESH), params={"x": SimpleNamespace(is_fully_addressable=0)})
    with pytest.raises(ValueError, match=r"weights\.save needs all shards .*; load the model in a single process"):
        weights.save(elsewhere, tmp_path / "saved")
    with pytest.raises(ValueError, match=r"Loaded\.logits needs all shards"):
        elsewhere.logits(np.zeros((1, 4), np.int32))


def test_the_repr_of_details_is_short():
    assert "tokenizer.json" not in repr(Details(64, files={"tokenizer.json": b"x" * 10**6}))


def test_a_mesh_that_does_not_fit_is_an_error(tmp_path):
    for mesh, expected in (
        (config.Mesh(context=3, simulate=8), "does not fit 8 devices"),
        (config.Mesh(tensor=8, context=1, simulate=8), "model.heads=4 must be a multiple of mesh.tensor = 8"),
    ):
        with pytest.raises(ValueError, match=expected):
            weights.load(DIRECTORY / "llama", mesh)


def test_a_model_without_a_tokenizer_loads():
    loaded = weights.load(DIRECTORY / "llama", MESH)
    with pytest.raises(ValueError, match=r"has no tokenizer\.json; copy it there"):
        _ = loaded.tokenizer


LOAD = """
import sys
from pathlib import Path
from ringattn import config, weights
loaded = weights.load(sys.argv[1], config.Mesh(simulate=8))
parameters = weights.count_parameters(loaded.params)
# Not ru_maxrss, which counts the memory of the parent process at the fork.
peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
print(parameters, 1024 * int(peak.split()[1]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peak_memory_of_loading_2_gb(dtype, tmp_path):
    """The process stays below the bytes of the parameters plus 0.5 GiB. JAX itself takes 0.3 of these."""
    c = config.Model(layers=12, dim=1536, heads=12, kv_heads=4, head_dim=128, feed_forward=6144, vocabulary=96_000)
    sizes, generator = letter_sizes(c), np.random.default_rng(0)
    shapes = {
        name: stored_shape(rule, sizes) for rule in rules(HUGGING_FACE, c) for name in stored_names(rule, c.layers)
    }
    (tmp_path / "model").mkdir()
    content = (generator.random(shape, np.float32) for shape in shapes.values())
    list(write_file(tmp_path / "model" / "model.safetensors", shapes, dtype, content))
    (tmp_path / "model" / "config.json").write_text(json.dumps(write_config(c, 2048, dtype)))
    command = [sys.executable, "-c", LOAD, str(tmp_path / "model")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr
    parameters, peak = map(int, done.stdout.split())
    print(f"{dtype}: parameters {4 * parameters / GIB:.3f} GiB, peak {peak / GIB:.3f} GiB")
    assert 4 * parameters > 1.9 * GIB
    assert peak < 4 * parameters + GIB / 2
