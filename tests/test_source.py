"""Damaged and hostile checkpoints: one message that names the file and a fix, never other weights."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from gguf_models import llama3_source, write_gguf
from make_family_logits import DIRECTORY

from ringattn import config, weights
from ringattn.weights.loading import is_run

MESH = config.Mesh(simulate=8)
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
LAYER_0 = "model.layers.0."


@pytest.fixture
def model(tmp_path) -> Path:
    """A Hugging Face directory with one file of weights."""
    target = tmp_path / "model"
    target.mkdir()
    for name in ("config.json", SINGLE):
        shutil.copy(DIRECTORY / "llama" / name, target)
    return target


@pytest.fixture
def sharded(tmp_path, monkeypatch) -> Path:
    """A Hugging Face directory with an index and several files of weights."""
    monkeypatch.setattr("ringattn.weights.saving.MAX_FILE_BYTES", 6000)
    weights.save(weights.load(DIRECTORY / "llama", MESH), tmp_path / "model")
    return tmp_path / "model"


def refusal(path: Path) -> str:
    """The message of a checkpoint that is refused: one line, and it names the file."""
    with pytest.raises(ValueError) as error:  # noqa: PT011
        weights.load(path, MESH)
    message = str(error.value)
    assert "\n" not in message
    assert str(path) in message
    assert len(message) < 2000
    return message


def edit_json(path: Path, edit: Callable[[Any], Any]) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps(edit(content) or content))


def edit_header(path: Path, edit: Callable[[Any], Any]) -> None:
    """Replaces the header of a safetensors file; the data stay."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    new = json.dumps(edit(header) or header).encode()
    path.write_bytes(len(new).to_bytes(8, "little") + new + content[8 + length :])


def set_entry(name: str, **values: Any) -> Callable[[Any], Any]:
    def edit(header: Any) -> None:
        header[name].update(values)

    return edit


def renamed(one: str, other: str) -> Callable[[Any], Any]:
    return lambda header: {other if name == one else name: value for name, value in header.items()}


QUERY = LAYER_0 + "self_attn.q_proj.weight"
HEADERS = {
    "outside": (set_entry(QUERY, data_offsets=[10**9, 10**9 + 1024]), "which have"),
    "negative": (set_entry(QUERY, data_offsets=[-1024, 0]), "must be two positions"),
    "reversed": (set_entry(QUERY, data_offsets=[1024, 0]), "takes 1024 bytes, not -1024"),
    "overlap": (set_entry(QUERY, data_offsets=[0, 1024]), "overlaps the one before it"),
    "shape": (set_entry(QUERY, shape=[32, 17]), "takes 1088 bytes, not 1024"),
    "negative shape": (set_entry(QUERY, shape=[-32, -16]), "must be a list of at most 8 sizes"),
    "bool shape": (set_entry(QUERY, shape=[True, 512]), "must be a list of at most 8 sizes"),
    "float offset": (set_entry(QUERY, data_offsets=[0.0, 1024.0]), "must be two positions"),
    "huge shape": (set_entry(QUERY, shape=[2**62, 2**62]), "takes"),
    "dtype": (set_entry(QUERY, dtype="F17"), "unknown dtype 'F17'"),
    "object dtype": (set_entry(QUERY, dtype={"a": 1}), "unknown dtype"),
    "quantized": (set_entry(QUERY, dtype="I16"), "self_attn.q_proj.weight is I16"),
    "extra key": (set_entry(QUERY, x=1), "exactly dtype, shape and data_offsets"),
    "entry": (lambda header: header.update({QUERY: 3}), "exactly dtype, shape and data_offsets"),
    "renamed": (renamed(QUERY, "model.layers.0.self_attn.Q_proj.weight"), "surplus: model.layers.0.self_attn.Q_proj"),
    "missing layer": (lambda header: header.pop(QUERY) and None, "leaves a gap before it"),
    "transposed": (set_entry(QUERY, shape=[16, 32]), "has shape (16, 32) instead of (32, 16)"),
    "not an object": (lambda header: [header], "it is not an object"),
    "long numbers": (
        lambda header: {
            re.sub(r"layers\.(.)\.mlp\.up", lambda match: f"{match[1] * 5000}.", name): entry
            for name, entry in header.items()
        },
        "surplus: model.000",
    ),
    "long name": (renamed(QUERY, "\n" + "x" * 10**5), "surplus: ?xx"),
    "path": (renamed(QUERY, "../../etc/passwd"), "surplus: ../../etc/passwd"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_wrong_header(case, model):
    edit, expected = HEADERS[case]
    edit_header(model / SINGLE, edit)
    assert expected in refusal(model)


def test_missing_surplus_and_misshapen_tensors_are_listed_at_once(model):
    def edit(header: Any) -> Any:
        names = {LAYER_0 + "mlp.up_proj.weight": "model.extra", "model.layers.1.mlp.up_proj.weight": "model.more"}
        set_entry(QUERY, shape=[16, 32])(header)
        return {names.get(name, name): value for name, value in header.items()}

    edit_header(model / SINGLE, edit)
    message = refusal(model)
    assert "missing: model.layers.[0-1].mlp.up_proj.weight;" in message
    assert "surplus: model.extra, model.more;" in message
    assert f"{QUERY} has shape (16, 32) instead of (32, 16)" in message


@pytest.mark.parametrize("size", [0, 7, 8, 100, 3000, -1])
def test_a_truncated_file(size, model):
    content = (model / SINGLE).read_bytes()
    (model / SINGLE).write_bytes(content[:size])
    message = refusal(model)
    assert str(model / SINGLE) in message
    assert "download it again" in message


def test_a_file_that_is_too_long(model):
    (model / SINGLE).write_bytes((model / SINGLE).read_bytes() + b"\0\0")
    assert "the tensors end at byte" in refusal(model)


def test_a_header_of_garbage(model):
    for content in (b"\xff" * 4096, (2**63).to_bytes(8, "little") + b"{}", (4000).to_bytes(8, "little") + b"[" * 4000):
        (model / SINGLE).write_bytes(content)
        assert str(model / SINGLE) in refusal(model)


def test_only_a_pickle(model):
    (model / SINGLE).rename(model / "pytorch_model.bin")
    message = refusal(model)
    assert "pytorch_model.bin" in message
    assert "save_pretrained" in message
    (model / "pytorch_model.bin").unlink()
    assert "has neither model.safetensors nor" in refusal(model)


def test_a_missing_shard(sharded):
    file = sorted(sharded.glob("model-*"))[1]
    file.rename(sharded / "elsewhere")
    message = refusal(sharded)
    assert f"{file} is missing" in message
    assert "download it" in message


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("../model.safetensors", "must be a plain file name"),
        ("/etc/passwd", "must be a plain file name"),
        ("a\\b", "must be a plain file name"),
        ("..", "must be a plain file name"),
        ("", "must be a plain file name"),
        ("a\0b", "must be a plain file name"),
        ("x" * 5000, "must be a plain file name"),
        ("x" * 250, "is missing"),
        ("\ud800", "is missing"),
        (["a"], "must be a plain file name"),
        (7, "must be a plain file name"),
        (None, "must be a plain file name"),
    ],
    ids=lambda value: ascii(value)[:20],
)
def test_an_index_with_another_name(value, expected, sharded):
    edit_json(sharded / INDEX, lambda index: index["weight_map"].update({QUERY: value}))
    assert expected in refusal(sharded)


def test_other_mistakes_of_an_index(sharded):
    original = (sharded / INDEX).read_text()
    first, second = sorted(path.name for path in sharded.glob("model-*"))[:2]
    mistakes = {
        "weight_map must map": lambda index: index.update(weight_map=[1]),
        "contains the tensor": lambda index: index["weight_map"].pop("model.embed_tokens.weight") and None,
        "lacks the tensor 'a'": lambda index: index["weight_map"].update(a=first),
        "assigns to": lambda index: index["weight_map"].update({"model.embed_tokens.weight": second}),
    }
    for expected, edit in mistakes.items():
        (sharded / INDEX).write_text(original)
        edit_json(sharded / INDEX, edit)
        assert expected in refusal(sharded)
    (sharded / INDEX).write_text(original.replace('"weight_map"', '"metadata"'))
    assert "the key 'metadata' occurs twice" in refusal(sharded)


def test_links_stay_inside(model, tmp_path):
    """Hugging Face's cache links to ../../blobs; other links could copy private files into a saved model."""
    outside = tmp_path / "private.json"
    outside.write_text("{}")
    (model / "tokenizer_config.json").symlink_to(outside)
    assert "is a symbolic link" in refusal(model)
    cache = tmp_path / "cache" / "snapshots" / "abc"
    cache.mkdir(parents=True)
    (tmp_path / "cache" / "blobs").mkdir()
    for name in ("config.json", SINGLE):
        shutil.move(model / name, tmp_path / "cache" / "blobs" / f"hash-{name}")
        (cache / name).symlink_to(f"../../blobs/hash-{name}")
    assert weights.load(cache, MESH).config.layers == 2


@pytest.mark.parametrize("create", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")], ids=["pipe", "device"])
@pytest.mark.parametrize(
    ("name", "expected"), [(SINGLE, "has neither model.safetensors"), ("config.json", "has no config.json")]
)
def test_a_pipe_is_not_opened(name, expected, create, model):
    (model / name).unlink()
    create(model / name)
    assert expected in refusal(model)


@pytest.mark.parametrize("name", ["checkpoints", "checkpoints/llama", "checkpoints/400", "with checkpoints"])
def test_a_model_beside_other_checkpoints_is_no_run(name, model, tmp_path):
    target = tmp_path / name
    target.parent.mkdir(exist_ok=True)
    model.rename(target)
    (target / "checkpoints").mkdir()
    assert not is_run(target)
    assert weights.load(target, MESH).config.layers == 2


def test_paths_that_are_no_model(tmp_path):
    assert "does not exist" in refusal(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    assert "has no config.json" in refusal(tmp_path / "empty")
    assert "cannot be opened (File name too long)" in refusal(tmp_path / ("x" * 300))
    (tmp_path / "text.txt").write_text("text")
    assert "is a file, but not a GGUF file" in refusal(tmp_path / "text.txt")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"a\nb": 1}, "a?b=1 may change"),
        ({"x" * 5000: 1}, "xxx...=1 may change"),
        ({"model_type": "x" * 5000}, "is an unknown family"),
        ({"architectures": ["x" * 5000]}, "must be ['LlamaForCausalLM']"),
        ({"eos_token_id": "x" * 5000}, "must be a token id"),
        ({"hidden_size": 10**3000}, "must fit 64 bits"),
        ({"rope_parameters": {"rope_type": "x" * 5000}}, "is not supported"),
        ({"rope_parameters": {"rope_type": "yarn", "type": "x" * 5000}}, "contradicts rope_type='yarn'"),
        ({"rope_parameters": {"full_attention": {}, "x" * 5000: {}}}, "must be one set of parameters"),
        ({"rms_norm_eps": 10**400}, "must be a finite number"),
    ],
    ids=lambda value: ascii(value)[:40],
)
def test_values_of_a_config_are_bounded(change, expected, model):
    edit_json(model / "config.json", lambda c: c.update(change))
    assert expected in refusal(model)


@pytest.mark.parametrize(
    "content", [b"", b"[1]", b"{", b"\xff\xfe", b"[" * 10**5, b'{"a": NaN}', b'{"a": 1' + b"0" * 5000]
)
def test_a_config_that_is_not_json(content, model):
    (model / "config.json").write_bytes(content)
    message = refusal(model)
    assert str(model / "config.json") in message
    assert "not a valid JSON object" in message


def test_an_output_projection_that_contradicts_tying(model):
    edit_json(model / "config.json", lambda c: c.update(tie_word_embeddings=True))
    assert "lm_head.weight differs from model.embed_tokens.weight" in refusal(model)


def test_a_copy_of_the_embedding_is_accepted(tmp_path):
    """Some checkpoints store the tied output projection."""
    shutil.copytree(DIRECTORY / "qwen2", tmp_path / "model")
    path = tmp_path / "model" / SINGLE
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    begin, end = header["model.embed_tokens.weight"]["data_offsets"]
    data = content[8 + length :]
    header["lm_head.weight"] = header["model.embed_tokens.weight"] | {
        "data_offsets": [len(data), len(data) + end - begin]
    }
    new = json.dumps(header).encode()
    path.write_bytes(len(new).to_bytes(8, "little") + new + data + data[begin:end])
    jax.tree.map(
        np.testing.assert_array_equal,
        weights.load(tmp_path / "model", MESH).params,
        weights.load(DIRECTORY / "qwen2", MESH).params,
    )


def mutate(file: Path, generator: np.random.Generator) -> int:
    """Changes a random byte of a file. Returns its position."""
    content = bytearray(file.read_bytes())
    position = int(generator.integers(len(content)))
    content[position] ^= int(generator.integers(1, 256))
    file.write_bytes(content)
    return position


def try_load(path: Path) -> weights.Loaded | None:
    """The loaded model, or None after a message of one line that names a file."""
    try:
        return weights.load(path, MESH)
    except ValueError as error:
        message = str(error)
    assert str(path) in message
    assert "\n" not in message
    assert "; " in message, message  # followed by a fix
    return None


def same_weights(one: weights.Loaded, other: weights.Loaded) -> bool:
    return all(map(np.array_equal, jax.tree.leaves(one.params), jax.tree.leaves(other.params)))


def test_200_mutations_of_a_directory(sharded):
    """A changed byte gives a message, or it is a number that nothing can check: of the config or of the data."""
    original, generator, loads = weights.load(sharded, MESH), np.random.default_rng(0), 0
    shard = sorted(sharded.glob("model-*"))[1]
    files = [sharded / "config.json", sharded / INDEX, shard]
    for number in range(200):
        file = files[number % 3]
        before = file.read_bytes()
        position = mutate(file, generator)
        loaded = try_load(sharded)
        file.write_bytes(before)
        if loaded is not None:
            loads += 1
            data = 8 + int.from_bytes(before[:8], "little")
            if file != shard or position < data:
                assert same_weights(loaded, original), (file.name, position)
    assert 20 < loads < 150


@pytest.mark.parametrize(("case", "count"), [("gemma2", 60), ("llama3", 20)])
def test_mutations_of_a_gguf_file(case, count, tmp_path):
    file = tmp_path / "model.gguf"
    write_gguf(llama3_source(tmp_path / "source") if case == "llama3" else DIRECTORY / case, file)
    original, generator, loads = weights.load(file, MESH), np.random.default_rng(0), 0
    before = file.read_bytes()
    data = before.rindex(b"output_norm.weight")  # a name in the header, close to the data
    for number in range(count):
        content = bytearray(before)
        position = int(generator.integers(data if number % 4 else len(before)))
        content[position] ^= int(generator.integers(1, 256))
        file.write_bytes(content)
        loaded = try_load(file)
        if loaded is not None:
            loads += 1
            assert position > data or same_weights(loaded, original), position
    assert count / 10 < loads < count * 0.9


@pytest.mark.parametrize("size", [0, 3, 4, 20, 24, 1000, 5000, -5])
def test_a_truncated_gguf_file(size, tmp_path):
    write_gguf(DIRECTORY / "llama", tmp_path / "whole.gguf")
    file = tmp_path / "model.gguf"
    file.write_bytes((tmp_path / "whole.gguf").read_bytes()[:size])
    assert "is not a valid GGUF file" in refusal(file)


@pytest.mark.parametrize("kind", ["I8", "I32", "Q8_0"])
def test_a_rope_tensor_of_another_type(kind, tmp_path):
    from gguf import GGMLQuantizationType

    file = tmp_path / "model.gguf"
    write_gguf(llama3_source(tmp_path / "source"), file)
    content = bytearray(file.read_bytes())
    position = content.index(b"rope_freqs.weight") + len("rope_freqs.weight") + 4 + 8  # after the dims
    content[position : position + 4] = int(GGMLQuantizationType[kind]).to_bytes(4, "little")
    file.write_bytes(content)
    message = refusal(file)
    assert "I32, not F32 or F16" in message if kind == "I32" else "rope_freqs.weight" in message


def test_the_items_of_gguf_metadata_are_bounded(tmp_path, monkeypatch):
    """Python needs many times the bytes of an array, of which several might fill the file."""
    write_gguf(DIRECTORY / "llama", tmp_path / "model.gguf")  # with tokens, types and merges
    monkeypatch.setattr("ringattn.weights.gguf_file.MAX_ITEMS", 70)
    assert "its arrays of metadata have more than 70 items" in refusal(tmp_path / "model.gguf")


def test_counts_of_a_gguf_file_are_bounded(tmp_path):
    """A count of 2**60 must not allocate or loop."""
    file = tmp_path / "model.gguf"
    head = b"GGUF" + (3).to_bytes(4, "little")
    count = (2**60).to_bytes(8, "little")
    key = (1).to_bytes(8, "little") + b"k"
    contents = {
        "tensors": head + count + bytes(8),
        "values": head + bytes(8) + count,
        "string": head + bytes(8) + (1).to_bytes(8, "little") + count,
        "array": head + bytes(8) + (1).to_bytes(8, "little") + key + bytes([9, 0, 0, 0, 0, 0, 0, 0]) + count,
        "array of strings": head + bytes(8) + (1).to_bytes(8, "little") + key + bytes([9, 0, 0, 0, 8, 0, 0, 0]) + count,
    }
    for content in contents.values():
        file.write_bytes(content + bytes(64))
        assert "only" in refusal(file)
