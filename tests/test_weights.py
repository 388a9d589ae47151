"""Compares loaded and saved models with transformers: stored logits of tiny models, and live where it is installed."""

import importlib
import importlib.util
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from make_family_logits import (
    DIRECTORY,
    FAMILIES,
    LENGTH,
    SIZES,
    VARIANTS,
    make_model,
    random_tokens,
    transformers_logits,
)

from ringattn import config, weights
from ringattn.config.choices import FamilyName
from ringattn.model import families
from ringattn.weights.loaded import Loaded, _logits_program

MESH = config.Mesh(simulate=8)
TOLERANCE = 1e-4
CASES = [*FAMILIES, *VARIANTS]
QUICK = {"llama-yarn", "llama-llama3", "mistral", "qwen2-window", "qwen3", "gemma2", "gemma3-linear"}
"""Cases that together have every family and every RoPE scaling; the others are slow tests."""
NEEDS_TRANSFORMERS = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None or importlib.util.find_spec("torch") is None,
    reason="needs the extra parity",
)


def family_of(case: str) -> str:
    return case.split("-")[0]


def tokens_of(case: str) -> np.ndarray:
    return random_tokens(list(FAMILIES).index(family_of(case)))


def stored_logits(case: str) -> np.ndarray:
    with np.load(DIRECTORY / family_of(case) / "logits.npz") as stored:
        return stored[case]


def directory_of(case: str, place: Path) -> Path:
    """A Hugging Face directory of a case. Variants share the weights of their family."""
    if case in FAMILIES:
        return DIRECTORY / case
    place.mkdir()
    shutil.copy(DIRECTORY / family_of(case) / "model.safetensors", place)
    shutil.copy(DIRECTORY / family_of(case) / f"{case}.json", place / "config.json")
    return place


def distance(one: np.ndarray, other: np.ndarray) -> float:
    assert one.shape == other.shape
    assert one.dtype == other.dtype == np.float32
    return float(np.abs(one - other).max())


@pytest.mark.parametrize("case", [pytest.param(c, marks=[pytest.mark.slow] * (c not in QUICK)) for c in CASES])
def test_logits_are_those_of_transformers(case, tmp_path):
    """Also of packed documents, of other lengths, and after saving and loading again."""
    loaded = weights.load(directory_of(case, tmp_path / "source"), MESH)
    tokens = tokens_of(case)
    logits = loaded.logits(tokens)
    assert distance(logits[0], stored_logits(case)) < TOLERANCE
    assert loaded.config.window is None or loaded.config.window < LENGTH / 4, "the row reaches beyond the window"
    cut = 19
    packed = loaded.logits(tokens, np.where(np.arange(LENGTH) < cut, 3, 7)[None])
    assert distance(packed[:, :cut], logits[:, :cut]) < 1e-5
    assert distance(packed[:, cut:], loaded.logits(np.roll(tokens, -cut))[:, : LENGTH - cut]) < 1e-5
    shorter = loaded.logits(np.repeat(tokens[:, : LENGTH - 7], 3, 0)[:1])
    assert distance(shorter, logits[:, : LENGTH - 7]) < 1e-5, "a padded row"
    weights.save(loaded, tmp_path / "saved")
    again = weights.load(tmp_path / "saved", MESH)
    assert replace(again.config, family=loaded.config.family) == loaded.config
    np.testing.assert_array_equal(again.logits(tokens), logits)
    expected = (DIRECTORY / family_of(case) / "model.safetensors").stat().st_size
    assert abs((tmp_path / "saved" / "model.safetensors").stat().st_size - expected) < 100, "saved as float16"


@pytest.mark.slow
def test_every_speciality_matters(monkeypatch):
    """A mistake in any of them moves the logits by more than the tolerance of the test above."""

    def broken(case: str, **changes: object) -> Loaded:
        loaded = weights.load(DIRECTORY / case, MESH)
        return replace(loaded, config=replace(loaded.config, **changes))

    mistakes = {
        "window": broken("mistral", window=7),
        "no window": broken("mistral", window=None, pattern=None),
        "rope_theta": broken("llama", rope_theta=310.0),
        "norm_epsilon": broken("qwen3", norm_epsilon=1e-5),
        "gemma2 window": broken("gemma2", window=5),
        "gemma2 pattern": broken("gemma2", pattern=("full", "window")),
        "soft_cap": broken("gemma2", soft_cap=2.5),
        "final_soft_cap": broken("gemma2", final_soft_cap=3.1),
        "query_scale": broken("gemma2", query_scale=8**-0.5),
        "rope_local_theta": broken("gemma3", rope_local_theta=1e6),
        "gemma3 pattern": broken("gemma3", pattern=("window",) * 6 + ("full",)),
    }
    for name, loaded in mistakes.items():
        case = loaded.path.name
        assert distance(loaded.logits(tokens_of(case))[0], stored_logits(case)) > 10 * TOLERANCE, name
    gemma: tuple[FamilyName, ...] = ("gemma2", "gemma3")
    for case in gemma:
        for field, value in {"unit_offset": False, "scaled_embedding": False, "activation": "silu"}.items():
            loaded = weights.load(DIRECTORY / case, MESH)
            with monkeypatch.context() as patch:
                patch.setitem(families.FAMILIES, case, replace(families.FAMILIES[case], **{field: value}))
                _logits_program.cache_clear()
                logits = loaded.logits(tokens_of(case))
            assert distance(logits[0], stored_logits(case)) > 10 * TOLERANCE, (case, field)
    _logits_program.cache_clear()
    for case, part in {"qwen2": "bias", "qwen3": "query_norm", "gemma2": "post_norm"}.items():
        loaded = weights.load(DIRECTORY / case, MESH)

        def zeroed(path, leaf, part=part):
            return leaf * np.float32(part not in jax.tree_util.keystr(path))

        with jax.set_mesh(loaded.mesh):
            params = jax.tree_util.tree_map_with_path(zeroed, loaded.params)
        logits = replace(loaded, params=params).logits(tokens_of(case))
        assert distance(logits[0], stored_logits(case)) > 10 * TOLERANCE, (case, part)


def test_a_mesh_with_all_axes(tmp_path):
    """Rows over the data axis, heads and vocabulary over the tensor axis: every shard is read from its place."""
    loaded = weights.load(DIRECTORY / "qwen2", config.Mesh(data=2, context=2, tensor=2, simulate=8))
    logits = loaded.logits(np.repeat(tokens_of("qwen2"), 3, 0))
    assert logits.shape == (3, LENGTH, SIZES["vocab_size"])
    for row in logits:
        assert distance(row, stored_logits("qwen2")) < TOLERANCE
    weights.save(loaded, tmp_path / "saved")
    again = weights.load(tmp_path / "saved", MESH)
    original = weights.load(DIRECTORY / "qwen2", MESH)
    jax.tree.map(np.testing.assert_array_equal, again.params, original.params)


def test_wrong_tokens_are_errors(unchecked):
    loaded = weights.load(DIRECTORY / "llama", MESH)
    for tokens, message in (
        (np.array([1, 2]), "must be integers [B, L]"),
        (np.array([[0.5]]), "must be integers [B, L]"),
        (np.zeros((1, 0), np.int32), "must be integers [B, L]"),
        (np.array([[0, 43]]), "token id 43 must be from 0 to 42"),
        (np.array([[-1, 2]]), "token id -1 must be from 0 to 42"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            loaded.logits(tokens)
    with pytest.raises(ValueError, match="must have the shape of tokens"):
        loaded.logits(np.zeros((1, 4), np.int32), np.zeros((1, 3), np.int32))


def test_large_models_are_saved_as_several_files(tmp_path, monkeypatch):
    monkeypatch.setattr("ringattn.weights.saving.MAX_FILE_BYTES", 4000)
    loaded = weights.load(DIRECTORY / "llama", MESH)
    seen = []
    weights.save(loaded, tmp_path / "saved", lambda done, total: seen.append((done, total)))
    files = sorted(path.name for path in (tmp_path / "saved").glob("*.safetensors"))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    index = json.loads((tmp_path / "saved" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
    assert seen[-1][0] == seen[-1][1] == 2 * index["metadata"]["total_size"]
    jax.tree.map(np.testing.assert_array_equal, weights.load(tmp_path / "saved", MESH).params, loaded.params)


def test_save_does_not_overwrite(tmp_path):
    loaded = weights.load(DIRECTORY / "llama", MESH)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    for target, problem in ((tmp_path / "full", "is not empty"), (tmp_path / "full" / "mine.txt", "is a file")):
        with pytest.raises(ValueError, match=problem):
            weights.save(loaded, target)
    (tmp_path / "empty").mkdir()
    weights.save(loaded, tmp_path / "empty")
    assert (tmp_path / "empty" / "config.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "full"]


@NEEDS_TRANSFORMERS
@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore")
def test_live_parity_with_transformers(case, tmp_path):
    """A model with other weights and names of files, and the saved model loaded by transformers."""
    transformers = importlib.import_module("transformers")
    model = make_model(family_of(case), 100, **VARIANTS.get(case, {}))
    model.save_pretrained(tmp_path / "source", max_shard_size="20KB")
    assert (tmp_path / "source" / "model.safetensors.index.json").is_file()
    tokens = random_tokens(3, 80, 2)
    loaded = weights.load(tmp_path / "source", MESH)
    expected = transformers_logits(model, tokens)
    assert distance(loaded.logits(tokens), expected) < TOLERANCE
    weights.save(loaded, tmp_path / "saved")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", attn_implementation="eager")
    assert again.dtype == model.dtype
    assert distance(transformers_logits(again.eval(), tokens), expected) < 1e-6
