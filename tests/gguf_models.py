"""Writes tiny models of tests/data/families as GGUF files, in the way of llama.cpp's convert_hf_to_gguf.py."""

import json
from pathlib import Path
from typing import Any

import numpy as np

HIDDEN = {"llama", "mistral"}
"""Families whose query and key rows llama.cpp reorders."""
NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
GEMMA_NORMS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
PARTS = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}
PARTS |= {"self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
PARTS |= {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
TOP = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
TOP |= {"lm_head.weight": "output.weight"}


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Reads a trusted file of float16 tensors, independently of ringattn."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header.pop("__metadata__", None)

    def tensor(entry: dict[str, Any]) -> np.ndarray:
        begin, end = entry["data_offsets"]
        return np.frombuffer(content[8 + length + begin : 8 + length + end], np.float16).reshape(entry["shape"])

    return {name: tensor(entry) for name, entry in header.items()}


def gguf_name(name: str, gemma: bool) -> str:
    if name in TOP:
        return TOP[name]
    _, _, layer, part = name.split(".", 3)
    module, _, kind = part.rpartition(".")
    return f"blk.{layer}.{(PARTS | (GEMMA_NORMS if gemma else NORMS))[module]}.{kind}"


def write_gguf(source: Path, target: Path, tokens: bool = True, quantization: str = "F16") -> None:
    """Writes the model in the Hugging Face directory `source` as the file `target`."""
    import gguf

    c = json.loads((source / "config.json").read_text())
    family = c["model_type"].removesuffix("_text")
    gemma = family.startswith("gemma")
    arch = "llama" if family == "mistral" else family
    writer = gguf.GGUFWriter(target, arch)
    writer.add_block_count(c["num_hidden_layers"])
    writer.add_context_length(c["max_position_embeddings"])
    writer.add_embedding_length(c["hidden_size"])
    writer.add_feed_forward_length(c["intermediate_size"])
    writer.add_head_count(c["num_attention_heads"])
    writer.add_head_count_kv(c["num_key_value_heads"])
    writer.add_key_length(c["head_dim"])
    writer.add_value_length(c["head_dim"])
    writer.add_layer_norm_rms_eps(c["rms_norm_eps"])
    writer.add_file_type(1)
    rope = c["rope_parameters"]
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    if gemma:
        writer.add_sliding_window(c["sliding_window"])
        for name, add in (
            ("attn_logit_softcapping", writer.add_attn_logit_softcapping),
            ("final_logit_softcapping", writer.add_final_logit_softcapping),
        ):
            if c[name] is not None:
                add(c[name])
    if rope.get("rope_type") == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_factors(rope, c["head_dim"]))
    if tokens:
        add_tokenizer(writer, c["vocab_size"])
    for name, tensor in read_safetensors(source / "model.safetensors").items():
        if family in HIDDEN and ("q_proj" in name or "k_proj" in name):
            heads = c["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
            halves = tensor.reshape(heads, 2, c["head_dim"] // 2, -1)
            tensor = halves.swapaxes(1, 2).reshape(tensor.shape)
        if gemma and name.endswith("norm.weight"):
            tensor = tensor.astype(np.float32) + 1
        if tensor.ndim == 1:
            tensor = tensor.astype(np.float32)
        kind = gguf.GGMLQuantizationType[quantization if tensor.ndim == 2 and len(tensor.T) % 32 == 0 else "F16"]
        if tensor.dtype == np.float32 or kind.name == "F16":
            writer.add_tensor(gguf_name(name, gemma), np.ascontiguousarray(tensor))
        else:
            stored = gguf.quantize(tensor.astype(np.float32), kind)
            writer.add_tensor(gguf_name(name, gemma), stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama3_source(directory: Path) -> Path:
    """Creates the Hugging Face directory of a model with Llama 3's RoPE scaling. Returns `directory`."""
    source = Path(__file__).parent / "data" / "families" / "llama"
    directory.mkdir()
    (directory / "model.safetensors").symlink_to(source / "model.safetensors")
    c = json.loads((source / "config.json").read_text()) | {"head_dim": 8}
    rope = {"rope_type": "llama3", "factor": 32.0, "original_max_position_embeddings": 8192, "rope_theta": 5e5}
    c["rope_parameters"] = rope | {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    (directory / "config.json").write_text(json.dumps(c))
    return directory


def llama3_factors(rope: dict[str, Any], head_dim: int) -> np.ndarray:
    """The tensor of convert_hf_to_gguf.py: factors of Llama 3's scaling, per pair of dims."""
    factors = []
    for pair in range(head_dim // 2):
        wavelength = 2 * np.pi * rope["rope_theta"] ** (2 * pair / head_dim)
        original, factor = rope["original_max_position_embeddings"], rope["factor"]
        if wavelength < original / rope["high_freq_factor"]:
            factors.append(1)
        elif wavelength > original / rope["low_freq_factor"]:
            factors.append(factor)
        else:
            low, high = rope["low_freq_factor"], rope["high_freq_factor"]
            smooth = (original / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


def add_tokenizer(writer: Any, size: int) -> None:
    """Adds a byte-level BPE tokenizer: some letters, a merge, special tokens."""
    letters = [chr(each) for each in range(ord("a"), ord("a") + size - 3)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(["<|endoftext|>", "<|im_end|>", *letters, "ab"])
    writer.add_token_types([3, 3] + [1] * (size - 2))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_eot_token_id(0)
    writer.add_chat_template("{% for m in messages %}{{ m.content }}{% endfor %}")
