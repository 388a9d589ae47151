"""Metadata of a GGUF file to config.Model, per family.

GGUF leaves some values to llama.cpp's code (src/llama-model.cpp): the pattern of Gemma's windows, the RoPE base of
Gemma 3's window layers, and the logit scale of Gemma's largest models. Llama 3's RoPE scaling is a tensor.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ringattn import config
from ringattn.config.choices import FamilyName, LayerKind
from ringattn.model.families import FAMILIES
from ringattn.model.rope import frequencies
from ringattn.weights.huggingface_config import GEMMA, MAX_LAYERS, shortest_pattern
from ringattn.weights.tensors import Tensor
from ringattn.weights.untrusted import shortened
from ringattn.weights.values import Values

ARCHITECTURES: tuple[FamilyName, ...] = ("llama", "qwen2", "qwen3", "gemma2", "gemma3")
"""Names in general.architecture. Mistral's files have the name llama."""
ROPE_FREQUENCIES = "rope_freqs.weight"
"""Tensor of the factors by which Llama 3's RoPE scaling divides the frequencies."""
_LARGEST = {"gemma2": 46, "gemma3": 62}
"""Layers of the 27B models, whose logits are scaled by (dim / heads) ** -0.5 instead of head_dim ** -0.5."""
_LOCAL_THETA = 10_000.0


def read_metadata(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor], source: str) -> tuple[config.Model, int]:
    """Returns the model and its context length. Raises ValueError: see `huggingface_config.read_config`."""
    values = Values(metadata, source)
    family = values.take("general.architecture", str)
    if family not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise values.error(f"general.architecture={shortened(family)}", "is an unknown family", f"use one of {known}")
    if values.take("split.count", int, 1) > 1:
        problem = f"split.count={values.values['split.count']}: it is one of several files of a model"
        raise ValueError(f"{source}: {problem}; merge them with llama-gguf-split --merge")
    own = {name.removeprefix(f"{family}."): value for name, value in metadata.items() if name.startswith(f"{family}.")}
    values = Values(own, f"{source}: {family}")
    layers, heads = values.take("block_count", int), values.take("attention.head_count", int)
    if not 1 <= layers <= MAX_LAYERS:
        raise values.error(f"block_count={layers}", f"must be from 1 to {MAX_LAYERS}", "download the file again")
    dim = values.take("embedding_length", int)
    head_dim = values.take("attention.key_length", int, dim // max(heads, 1))
    values.refuse_other("attention.value_length", (head_dim,), "keys and values have the same size")
    values.refuse_other("rope.dimension_count", (head_dim,), "all dims of a head are rotated")
    context = values.take("context_length", int)
    embedding = tensors.get("token_embd.weight")
    vocabulary = values.take("vocab_size", int, None if embedding is None else embedding.shape[0])
    if vocabulary is None:
        raise values.error("vocab_size", "is missing, and so is token_embd.weight", "download the file again")
    fields: dict[str, Any] = {
        "family": family,
        "layers": layers,
        "dim": dim,
        "heads": heads,
        "kv_heads": values.take("attention.head_count_kv", int, heads),
        "head_dim": head_dim,
        "feed_forward": values.take("feed_forward_length", int),
        "vocabulary": vocabulary,
        "norm_epsilon": values.take("attention.layer_norm_rms_epsilon", float),
        "tied": "output.weight" not in tensors,
        "rope_theta": values.take("rope.freq_base", float, 10_000.0),
    }
    if family in GEMMA:
        fields |= _read_gemma(values, family, fields)
    fields |= _read_scaling(values, context)
    values.refuse_unused(frozenset({"expert_count", "expert_used_count"} if own.get("expert_count") == 0 else ()))
    try:
        model = config.Model(**fields)
    except ValueError as error:
        raise ValueError(f"{source}: {error}; download the file again") from None
    return _with_llama3_scaling(model, tensors, source), context


def _read_gemma(values: Values, family: FamilyName, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns window, pattern, scale and soft caps of Gemma."""
    layers, pattern = fields["layers"], FAMILIES[family].pattern
    kinds: tuple[LayerKind, ...] = tuple(pattern[layer % len(pattern)] for layer in range(layers))
    window = values.take("attention.sliding_window", int, 4096 if family == "gemma2" else None)
    values.refuse_other("attention.sliding_window_pattern", (len(pattern),), "the pattern of the family is used")
    if window is None or "window" not in kinds:
        window, shortest = None, None
    else:
        window, shortest = window - 1, shortest_pattern(kinds)
    size = fields["dim"] / max(fields["heads"], 1) if layers == _LARGEST[family] else fields["head_dim"]
    local = values.take("rope.freq_base_swa", float, _LOCAL_THETA) if family == "gemma3" else None
    caps = {"soft_cap": "attn_logit_softcapping", "final_soft_cap": "final_logit_softcapping"}
    default = vars(FAMILIES[family])
    return {
        "window": window,
        "pattern": shortest,
        "query_scale": max(size, 1) ** -0.5,
        "rope_local_theta": None if window is None else local,
        **{field: values.take(name, float, default[field]) for field, name in caps.items()},
    }


def _read_scaling(values: Values, context: int) -> dict[str, Any]:
    """Returns the fields of linear and YaRN scaling."""
    kind = values.take("rope.scaling.type", str, "none")
    factor = values.take("rope.scaling.factor", float, 1.0)
    original = values.take("rope.scaling.original_context_length", int, context)
    values.take("rope.scaling.finetuned", bool, False)
    values.refuse_other("rope.scaling.attn_factor", (1.0,), "YaRN's attention factor is that of the paper")
    values.refuse_other("rope.scaling.yarn_beta_fast", (32.0,), "ringattn uses the constant of the paper")
    values.refuse_other("rope.scaling.yarn_beta_slow", (1.0,), "ringattn uses the constant of the paper")
    if kind not in ("none", "linear", "yarn"):
        raise values.error(
            f"rope.scaling.type={shortened(kind)}", "is not supported", "supported are none, linear and yarn"
        )
    if factor < 1:
        raise values.error(f"rope.scaling.factor={factor}", "must be at least 1", "download the file again")
    if kind == "none" or factor == 1:
        return {}
    return {"rope_scaling": kind, "rope_factor": factor, "rope_original": original}


def _with_llama3_scaling(c: config.Model, tensors: Mapping[str, Tensor], source: str) -> config.Model:
    """Returns `c` with the RoPE scaling whose factors a tensor of the file contains.

    The parameters are not in the file. The factor is the largest value of the tensor. The training length is the one of
    powers of two that reproduces the tensor.
    """
    tensor = tensors.get(ROPE_FREQUENCIES)
    if tensor is None:
        return c
    if tensor.shape != (c.head_dim // 2,) or c.rope_scaling != "none":
        problem = f"{ROPE_FREQUENCIES} of shape {tensor.shape} does not fit head_dim={c.head_dim} without rope.scaling"
        raise ValueError(f"{source}: {problem}; download the file again")
    if tensor.dtype not in ("F32", "F16"):
        raise ValueError(f"{source}: {ROPE_FREQUENCIES} is {tensor.dtype}, not F32 or F16; download the file again")
    stored = tensor.read((slice(None),)).astype(np.float64)
    unscaled = frequencies(c)
    if np.allclose(stored, 1):
        return c
    for power in range(10, 21):
        if np.isfinite(stored).all() and stored.max() > 1:
            scaling = {"rope_scaling": "llama3", "rope_factor": float(stored.max()), "rope_original": 2**power}
            candidate = config.Model(**vars(c) | scaling)
            if np.allclose(unscaled / frequencies(candidate), stored, rtol=1e-5):
                return candidate
    problem = f"{ROPE_FREQUENCIES} is not the RoPE scaling of Llama 3, the only one that is stored as a tensor"
    raise ValueError(f"{source}: {problem}; use another file, or the Hugging Face directory of the model")
