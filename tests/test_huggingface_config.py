"""config.json: both forms of transformers give one model, and whatever ringattn does not implement is an error."""

import json
import re
from dataclasses import replace
from typing import Any

import pytest
from make_family_logits import DIRECTORY, FAMILIES

from ringattn import config
from ringattn.weights.huggingface_config import read_config, shortest_pattern, write_config

SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 576,
    "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pad_token_id": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
    "transformers_version": "4.42.3",
    "use_cache": True,
    "vocab_size": 49152,
}
"""config.json of HuggingFaceTB/SmolLM2-135M-Instruct."""
LLAMA3_SCALING = {
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
GEMMA3 = {
    "architectures": ["Gemma3ForCausalLM"],
    "attention_bias": False,
    "attn_logit_softcapping": None,
    "cache_implementation": "hybrid",
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "model_type": "gemma3_text",
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "torch_dtype": "bfloat16",
    "vocab_size": 262144,
}
"""config.json of google/gemma-3-1b-it."""


def model_of(content: dict[str, Any], **changes: Any) -> config.Model:
    return read_config(content | changes, "config.json")[0]


def stored(case: str) -> dict[str, Any]:
    return json.loads((DIRECTORY / case / "config.json").read_text())


def test_published_configs():
    model, context = read_config(SMOLLM2, "config.json")
    assert context == 8192
    assert model == config.Model(
        layers=30,
        dim=576,
        heads=9,
        kv_heads=3,
        head_dim=64,
        feed_forward=1536,
        vocabulary=49152,
        rope_theta=100_000.0,
        norm_epsilon=1e-5,
    )
    found = model_of(SMOLLM2, rope_scaling=LLAMA3_SCALING, rope_theta=5e5)
    assert found == replace(model, rope_theta=5e5, rope_scaling="llama3", rope_factor=32.0, rope_original=8192)
    gemma = model_of(GEMMA3)
    assert (gemma.window, gemma.pattern) == (511, ("window",) * 5 + ("full",))
    assert (gemma.rope_theta, gemma.rope_local_theta, gemma.query_scale, gemma.tied) == (1e6, 1e4, 1 / 16, True)
    assert (gemma.soft_cap, gemma.final_soft_cap) == (0.0, 0.0)


def test_both_forms_of_rope_are_one_model():
    old = model_of(SMOLLM2, rope_scaling={"type": "linear", "factor": 2})
    new = {name: value for name, value in SMOLLM2.items() if name not in ("rope_theta", "rope_scaling")}
    assert old == model_of(new, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 100_000.0})
    gemma = {name: value for name, value in GEMMA3.items() if "rope" not in name}
    nested = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    old = model_of(GEMMA3, rope_scaling={"rope_type": "linear", "factor": 8.0})
    assert old == model_of(gemma, rope_parameters=nested)
    assert (old.rope_scaling, old.rope_factor, old.rope_local_theta) == ("linear", 8.0, 1e4)


def test_defaults_are_those_of_transformers():
    """An omitted value has the default of the family's class, which is not the same in all families."""
    needed = (
        "model_type",
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
    )
    for family, (kv_heads, head_dim, tied, theta, window, expected) in {
        "llama": (64, 4, False, 1e4, None, 2048),
        "mistral": (8, 4, False, 1e4, 4095, 131_072),
        "qwen2": (32, 4, False, 1e4, None, 32_768),
        "qwen3": (32, 128, False, 1e4, None, 32_768),
        "gemma2": (4, 256, True, 1e4, 4095, 8192),
        "gemma3": (4, 256, True, 1e6, 4095, 131_072),
    }.items():
        content = {name: value for name, value in stored(family).items() if name in needed}
        found, context = read_config(content | {"num_attention_heads": 64, "hidden_size": 256}, "config.json")
        assert context == expected
        assert (found.kv_heads, found.head_dim, found.tied, found.rope_theta, found.window) == (
            kv_heads, head_dim, tied, theta, window,
        ), family  # fmt: skip
        assert found.norm_epsilon == 1e-6
    assert (found.query_scale, found.rope_local_theta) == (1 / 16, 1e4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_survives_both_ways(family):
    model = model_of(stored(family))
    content = write_config(model, 64, "float32")
    assert read_config(content, "config.json") == (model, 64)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}


def test_yarn_constants():
    expected = model_of(SMOLLM2, rope_scaling=YARN)
    assert (expected.rope_scaling, expected.rope_factor, expected.rope_original) == ("yarn", 4.0, 2048)
    same = {"beta_fast": 32, "beta_slow": 1.0, "attention_factor": 1.1386294361119891, "truncate": True}
    assert model_of(SMOLLM2, rope_scaling=YARN | same) == expected
    assert model_of(SMOLLM2, rope_scaling=YARN | {"mscale": 1.0}) == expected
    assert model_of(SMOLLM2, rope_scaling=YARN | {"factor": None}) == expected  # 8192 / 2048
    assert model_of(SMOLLM2, rope_scaling=YARN | {"factor": 1.0}) == model_of(SMOLLM2)


UNSUPPORTED = {
    "model_type='gpt2'": {"model_type": "gpt2"},
    "model_type=5": {"model_type": 5},
    "architectures=['LlamaForSequenceClassification']": {"architectures": ["LlamaForSequenceClassification"]},
    "attention_bias=True": {"attention_bias": True},
    "mlp_bias=True": {"mlp_bias": True},
    "hidden_act='relu'": {"hidden_act": "relu"},
    "partial_rotary_factor=0.5": {"partial_rotary_factor": 0.5},
    "rope_interleaved=True": {"rope_interleaved": True},
    "quantization_config={'bits': 4}": {"quantization_config": {"bits": 4}},
    "rope_type='dynamic'": {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    "rope_type='longrope'": {"rope_scaling": {"type": "longrope", "factor": 2.0}},
    "type='linear' contradicts": {"rope_scaling": {"type": "linear", "rope_type": "yarn", "factor": 2.0}},
    "factor=0.5": {"rope_scaling": {"rope_type": "linear", "factor": 0.5}},
    "factor=None": {"rope_scaling": {"rope_type": "linear"}},
    "factor='2'": {"rope_scaling": {"rope_type": "linear", "factor": "2"}},
    "beta_fast=16": {"rope_scaling": YARN | {"beta_fast": 16}},
    "beta_slow=2": {"rope_scaling": YARN | {"beta_slow": 2}},
    "truncate=False": {"rope_scaling": YARN | {"truncate": False}},
    "attention_factor=1": {"rope_scaling": YARN | {"attention_factor": 1.0}},
    "attention_factor=0.9": {"rope_scaling": YARN | {"mscale": 0.707, "mscale_all_dim": 1.0}},
    "low_freq_factor=2": {"rope_scaling": LLAMA3_SCALING | {"low_freq_factor": 2}},
    "high_freq_factor=8": {"rope_scaling": LLAMA3_SCALING | {"high_freq_factor": 8}},
    "short_factor=[1]": {"rope_scaling": YARN | {"short_factor": [1]}},
    "contradict each other": {"rope_scaling": YARN, "rope_parameters": LLAMA3_SCALING},
    "contradicts rope_theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}},
    "one set of parameters": {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
    "sliding_window=512": {"sliding_window": 512},
    "attention_sinks=True": {"attention_sinks": True},
    "logit_scale=2": {"logit_scale": 2},
    "rope_thetA=1": {"rope_thetA": 1},
    "hidden_size='576'": {"hidden_size": "576"},
    "hidden_size=576.0": {"hidden_size": 576.0},
    "vocab_size=True": {"vocab_size": True},
    "num_hidden_layers=100000000000": {"num_hidden_layers": 10**11},
    "num_hidden_layers=0": {"num_hidden_layers": 0},
    "model.heads=0": {"num_attention_heads": 0},
    "model.heads=9 must be a multiple of model.kv_heads=2": {"num_key_value_heads": 2},
    "model.head_dim=63": {"head_dim": 63},
    "model.norm_epsilon": {"rms_norm_eps": -1.0},
    "model.vocabulary": {"vocab_size": -5},
}


@pytest.mark.parametrize("expected", UNSUPPORTED)
def test_what_is_not_implemented_is_an_error(expected):
    with pytest.raises(ValueError, match=re.escape(expected)) as error:
        model_of(SMOLLM2, **UNSUPPORTED[expected])
    assert str(error.value).startswith("config.json: ")
    assert ";" in str(error.value)


def test_an_unknown_family_lists_the_known_ones():
    with pytest.raises(ValueError, match="Gemma3ForCausalLM") as error:
        model_of(SMOLLM2, model_type="mamba")
    assert all(f"({stored(family)['model_type']})" in str(error.value) for family in FAMILIES)
    with pytest.raises(ValueError, match="image encoder"):
        model_of(GEMMA3, model_type="gemma3", architectures=["Gemma3ForConditionalGeneration"])


@pytest.mark.parametrize("name", ["hidden_size", "vocab_size", "model_type", "num_hidden_layers"])
def test_a_missing_value(name):
    with pytest.raises(ValueError, match=f"{name} is missing"):
        model_of({key: value for key, value in SMOLLM2.items() if key != name})


@pytest.mark.parametrize(
    ("family", "changes", "expected"),
    [
        ("mistral", {"sliding_window": 0}, "sliding_window=0 must be at least 1"),
        ("mistral", {"layer_types": ["full_attention"] * 2}, "layer_types is not supported"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 2}, "use_sliding_window is not set"),
        ("qwen2", {"layer_types": ["chunked_attention"] * 2}, "must be a list of 2 times"),
        ("qwen2", {"layer_types": ["full_attention"]}, "must be a list of 2 times"),
        ("gemma2", {"hidden_activation": "gelu"}, "hidden_activation='gelu' is not supported"),
        ("gemma2", {"sliding_window_size": 5}, "sliding_window_size=5 is not supported"),
        ("mistral", {"sliding_window": 2**31}, "model.window=2147483647 must be from 0 to 1073741824"),
        ("gemma2", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar=0.0 must be positive"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "transformers' Gemma 3 does not apply it"),
        ("gemma3", {"use_bidirectional_attention": True}, "attention is causal"),
        ("gemma3", {"rope_parameters": {"rope_type": "default"}}, "must have full_attention and sliding_attention"),
    ],
)
def test_what_a_family_does_not_have(family, changes, expected):
    with pytest.raises(ValueError, match=re.escape(expected)):
        model_of(stored(family), **changes)


def test_mistral_without_a_window():
    model = model_of(stored("mistral"), sliding_window=None)
    assert (model.window, model.pattern) == (None, None)
    written = write_config(model, 64, "float32")
    assert (written["model_type"], written["sliding_window"]) == ("mistral", None)
    assert read_config(written, "config.json") == (model, 64)


def test_both_names_of_the_window_of_gemma2():
    """The config.json of Gemma 2 9B has both."""
    content = stored("gemma2")
    assert model_of(content, sliding_window_size=content["sliding_window"]) == model_of(content)


def test_the_layers_of_qwen2_after_the_first_ones_have_the_window():
    content = stored("qwen2") | {"num_hidden_layers": 5, "use_sliding_window": True, "sliding_window": 9}
    content |= {"max_window_layers": 3, "layer_types": None}
    model = model_of(content)
    assert (model.window, model.pattern) == (8, ("full", "full", "full", "window", "window"))
    assert model_of(content, max_window_layers=5).pattern is None
    assert model_of(content, max_window_layers=0).pattern == ("window",)


def test_the_shortest_pattern():
    assert shortest_pattern(("window", "full") * 2 + ("window",)) == ("window", "full")
    assert shortest_pattern(("full",) * 7) == ("full",)
    assert shortest_pattern(("full", "full", "window")) == ("full", "full", "window")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"query_scale": 0.3}, "model.query_scale=0.3 cannot be written"),
        ({"soft_cap": 5.0}, "model.soft_cap=5.0 cannot be written"),
        ({"final_soft_cap": 5.0}, "model.final_soft_cap=5.0 cannot be written"),
        ({"window": 5, "pattern": ("window", "full")}, "has layers of one kind"),
        ({"window": 5, "rope_local_theta": 50.0}, "model.rope_local_theta=50.0 cannot be written"),
        ({"dim": 250}, "model.dim=250 cannot be written"),
        (
            {"family": "gemma3", "window": 5, "rope_scaling": "linear", "rope_factor": 2.0},
            "model.rope_local_theta=None",
        ),
        ({"family": "gemma3", "soft_cap": 5.0}, "model.soft_cap=5.0 cannot be written"),
    ],
)
def test_what_transformers_cannot_compute_is_not_written(changes, expected):
    with pytest.raises(ValueError, match=re.escape(expected)):
        write_config(config.Model(vocabulary=100, **changes), 64, "float32")


def test_a_model_trained_here_is_written():
    """Defaults of config.Model, a window (as Mistral), NTK scaling (a larger base) and YaRN (its context)."""
    written = write_config(config.Model(vocabulary=257), 2048, "float32")
    assert (written["model_type"], written["head_dim"], written["max_position_embeddings"]) == ("llama", 32, 2048)
    assert write_config(config.Model(vocabulary=257, window=7), 64, "float32")["sliding_window"] == 8
    ntk = config.Model(vocabulary=257, rope_scaling="ntk", rope_factor=4.0)
    assert write_config(ntk, 64, "float32")["rope_theta"] == pytest.approx(1e4 * 4 ** (16 / 15))
    yarn = config.Model(vocabulary=257, rope_scaling="yarn", rope_factor=4.0, rope_original=512)
    written = write_config(yarn, 64, "float32")
    assert written["max_position_embeddings"] == 2048
    assert read_config(written, "")[0] == yarn
