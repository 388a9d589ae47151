"""Writes tests/data/families: a tiny random model per family, with the logits that transformers computes.

    pip install -e '.[parity]' && python tests/make_family_logits.py

Norm scales are far from 1, biases and soft caps are large, and windows are shorter than the rows, so that logits differ
if any of these is wrong. Weights are rounded to float16 and logits are computed in float32.
"""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

DIRECTORY = Path(__file__).with_name("data") / "families"
LENGTH = 48
"""Tokens of the row. The windows are shorter."""
SIZES = {
    "vocab_size": 43,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-3,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 300.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 16, "rope_theta": 300.0}
LLAMA3 |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
GEMMA = {"query_pre_attn_scalar": 11, "final_logit_softcapping": 3.0}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 300.0}}),
    "mistral": ("Mistral", {"sliding_window": 7}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"num_hidden_layers": 3, "tie_word_embeddings": True}),
    "gemma2": ("Gemma2", GEMMA | {"num_hidden_layers": 3, "sliding_window": 7, "attn_logit_softcapping": 2.0}),
    "gemma3": ("Gemma3", GEMMA | {"num_hidden_layers": 7, "sliding_window": 7}),
}
"""transformers' prefix of each family, and its config besides SIZES."""
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 3000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "llama-linear": {"rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 300.0}},
    "llama-yarn": {"rope_parameters": YARN},
    "llama-llama3": {"rope_parameters": LLAMA3},
    "qwen2-window": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "qwen3-yarn": {"rope_parameters": YARN},
    "gemma2-full": {"layer_types": ["full_attention"] * 3, "attn_logit_softcapping": None},
    "gemma3-linear": {"rope_parameters": GEMMA3_ROPE, "final_logit_softcapping": None},
}
"""Changes of the config of a family; the weights are the same."""


def make_model(family: str, seed: int, **changes: Any) -> Any:
    """Returns a random model of transformers, whose weights are float16 values in float32."""
    torch, transformers = map(importlib.import_module, ("torch", "transformers"))
    prefix, own = FAMILIES[family]
    values = SIZES | own | changes
    config_class = "Gemma3TextConfig" if prefix == "Gemma3" else f"{prefix}Config"
    c = getattr(transformers, config_class)(**values, attn_implementation="eager")
    torch.manual_seed(seed)
    model = getattr(transformers, f"{prefix}ForCausalLM")(c)
    for name, parameter in model.named_parameters():
        is_norm = name.endswith("norm.weight")
        spread = 0.3 if is_norm else 0.5 if name.endswith("bias") else 1.2 * parameter.shape[-1] ** -0.5
        center = 1.0 if is_norm and not prefix.startswith("Gemma") else 0.2 if is_norm else 0.0
        parameter.data = (center + spread * torch.randn(parameter.shape)).half().float()
    model.tie_weights()
    return model.eval()


def transformers_logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    """Returns the float32 logits [B, L, V] of a model of transformers."""
    torch = importlib.import_module("torch")
    with torch.no_grad():
        return model(torch.from_numpy(tokens.astype(np.int64))).logits.float().numpy()


def random_tokens(seed: int, length: int = LENGTH, rows: int = 1) -> np.ndarray:
    """Returns token ids [rows, length] int32."""
    return np.random.default_rng(seed).integers(0, SIZES["vocab_size"], (rows, length), np.int32)


def main() -> None:
    for seed, family in enumerate(FAMILIES):
        model = make_model(family, seed)
        logits = {family: transformers_logits(model, random_tokens(seed))[0]}
        model.half().save_pretrained(DIRECTORY / family)  # last, because it also rounds the frequencies of RoPE
        for name, changes in VARIANTS.items():
            if name.split("-")[0] == family:
                variant = make_model(family, seed, **changes)
                logits[name] = transformers_logits(variant, random_tokens(seed))[0]
                variant.config.dtype = "float16"
                content = json.loads(variant.config.to_json_string())
                (DIRECTORY / family / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
        np.savez_compressed(DIRECTORY / family / "logits.npz", **logits)
        (DIRECTORY / family / "generation_config.json").unlink(missing_ok=True)
    size = sum(path.stat().st_size for path in DIRECTORY.rglob("*.*"))
    print(f"{DIRECTORY}: {size:,} bytes", file=sys.stderr)


if __name__ == "__main__":
    main()
