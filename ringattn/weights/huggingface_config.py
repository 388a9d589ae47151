"""config.json of Hugging Face to config.Model and back, per family.

Defaults are those of the families' classes in transformers, because config.json may omit them.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from ringattn import config
from ringattn.config.choices import FamilyName, LayerKind
from ringattn.model.families import FAMILIES, attention_soft_cap, layer_pattern, output_soft_cap
from ringattn.weights.huggingface_rope import FULL, SLIDING, read_rope, write_rope
from ringattn.weights.untrusted import shortened
from ringattn.weights.values import Values


class Names(NamedTuple):
    """Names of a family in config.json."""

    model_type: str
    architecture: str


NAMES: dict[FamilyName, Names] = {
    "llama": Names("llama", "LlamaForCausalLM"),
    "mistral": Names("mistral", "MistralForCausalLM"),
    "qwen2": Names("qwen2", "Qwen2ForCausalLM"),
    "qwen3": Names("qwen3", "Qwen3ForCausalLM"),
    "gemma2": Names("gemma2", "Gemma2ForCausalLM"),
    "gemma3": Names("gemma3_text", "Gemma3ForCausalLM"),
}
CONTEXTS: dict[FamilyName, int] = {
    "llama": 2048,
    "mistral": 131_072,
    "qwen2": 32_768,
    "qwen3": 32_768,
    "gemma2": 8192,
    "gemma3": 131_072,
}
"""Defaults of max_position_embeddings."""
GEMMA = ("gemma2", "gemma3")
MAX_LAYERS = 1000
"""Maximum number of layers, so that a damaged file cannot ask for a list that does not fit in memory."""
ACTIVATIONS = {"silu": ("silu", "swish"), "gelu": ("gelu_pytorch_tanh", "gelu_new", "gelu_fast")}
"""Names of our activations in config.json; the first one is written."""
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_HARMLESS = """
bos_token_id eos_token_id pad_token_id architectures model_type _name_or_path name_or_path license transformers_version
dtype torch_dtype torchscript use_cache cache_implementation initializer_range attention_dropout is_llama_config
pretraining_tp attn_implementation _attn_implementation _attn_implementation_autoset transformers.js_config
unsloth_version unsloth_fixed return_dict output_attentions output_hidden_states is_encoder_decoder is_decoder
chunk_size_feed_forward id2label label2id num_labels problem_type task_specific_params use_bfloat16
"""
HARMLESS = frozenset(_HARMLESS.split())
"""Values that do not affect the logits."""
REASONS = {
    "attention_bias": ((False,), "only Qwen2 has biases, of q, k and v"),
    "mlp_bias": ((False,), "feed-forward layers have no bias"),
    "use_bidirectional_attention": ((False,), "attention is causal"),
    "partial_rotary_factor": ((1, 1.0), "all dims of a head are rotated"),
    "rope_interleaved": ((False,), "RoPE rotates halves, not neighbours"),
    "quantization_config": ((), "quantized weights"),
    "use_mrope": ((False,), "positions are those of text"),
    "add_cross_attention": ((False,), "the model is decoder-only"),
}
"""Values that must be neutral, and why."""


def find_family(values: Values) -> FamilyName:
    """Returns the family of a config.json. Raises ValueError that lists the known families."""
    model_type: str = values.take("model_type", str)
    architectures = values.values.get("architectures")
    families: list[FamilyName] = [name for name, names in NAMES.items() if names.model_type == model_type]
    known = ", ".join(f"{names.architecture} ({names.model_type})" for names in NAMES.values())
    if not families:
        if model_type == "gemma3":
            fix = "save its text model alone, with transformers' Gemma3ForCausalLM"
            raise values.error("model_type='gemma3'", "has an image encoder, which ringattn does not run", fix)
        raise values.error(f"model_type={shortened(model_type)}", "is an unknown family", f"use one of {known}")
    family = families[0]
    if architectures not in (None, [NAMES[family].architecture]):
        rule = f"must be [{NAMES[family].architecture!r}] for model_type={model_type!r}"
        raise values.error(f"architectures={shortened(architectures)}", rule, f"use a causal language model: {known}")
    return family


def read_config(content: Mapping[str, Any], source: str) -> tuple[config.Model, int]:
    """Returns the model and its context length (max_position_embeddings). `source` names the file in messages.

    Raises ValueError for an unknown family, for a value of a wrong type, and for every value that changes the
    computation in a way that ringattn does not implement.
    """
    values = Values(content, source)
    family = find_family(values)
    for name, (accepted, reason) in REASONS.items():
        values.refuse_other(name, accepted or (None,), reason)
    _check_activation(values, family)
    heads, dim = values.take("num_attention_heads", int), values.take("hidden_size", int)
    layers = values.take("num_hidden_layers", int)
    if not 1 <= layers <= MAX_LAYERS:
        raise values.error(f"num_hidden_layers={layers}", f"must be from 1 to {MAX_LAYERS}", "download the file again")
    context = values.take("max_position_embeddings", int, CONTEXTS[family])
    rope, local = read_rope(values, family, context)
    window, pattern = _read_window(values, family, layers)
    head_dim = {"qwen3": 128, "gemma2": 256, "gemma3": 256}.get(family, dim // max(heads, 1))
    kv_heads = {"mistral": 8, "qwen2": 32, "qwen3": 32, "gemma2": 4, "gemma3": 4}.get(family, heads)
    fields = {
        "family": family,
        "layers": layers,
        "dim": dim,
        "heads": heads,
        "kv_heads": values.take(
            "num_key_value_heads", int, heads if values.is_null("num_key_value_heads") else kv_heads
        ),
        "head_dim": values.take("head_dim", int, head_dim),
        "feed_forward": values.take("intermediate_size", int),
        "vocabulary": values.take("vocab_size", int),
        "window": window,
        "pattern": pattern,
        "rope_local_theta": local if window is not None else None,
        "norm_epsilon": values.take("rms_norm_eps", float, 1e-6),
        "tied": values.take("tie_word_embeddings", bool, family in GEMMA),
    }
    fields |= rope._asdict() | _read_caps(values, family)
    values.refuse_unused(HARMLESS)
    try:
        return config.Model(**fields), context
    except ValueError as error:
        raise ValueError(f"{source}: {error}; download the file again") from None


def _check_activation(values: Values, family: FamilyName) -> None:
    activation = FAMILIES[family].activation
    names = ("hidden_activation", "hidden_act") if family in GEMMA else ("hidden_act",)
    for name in names:
        values.refuse_other(name, ACTIVATIONS[activation], f"{family} uses {activation}")


def _read_caps(values: Values, family: FamilyName) -> dict[str, float | None]:
    """Returns the logit scale and soft caps, which only Gemma has."""
    if family not in GEMMA:
        return {}
    scalar = values.take("query_pre_attn_scalar", float, 256.0)
    if scalar <= 0:
        raise values.error(f"query_pre_attn_scalar={scalar}", "must be positive", "correct it")
    caps = {"soft_cap": "attn_logit_softcapping", "final_soft_cap": "final_logit_softcapping"}
    default, fields = vars(FAMILIES[family]), {"query_scale": scalar**-0.5}
    for field, name in caps.items():
        fields[field] = values.take(name, float, 0.0 if values.is_null(name) else default[field])
    if family == "gemma3" and fields["soft_cap"]:
        rule = "is not supported: transformers' Gemma 3 does not apply it"
        raise values.error(f"attn_logit_softcapping={fields['soft_cap']}", rule, "set it to null")
    return fields


def _read_window(values: Values, family: FamilyName, layers: int) -> tuple[int | None, tuple[LayerKind, ...] | None]:
    """Returns `window` and `pattern` of the model."""
    if family == "llama":
        return None, None
    default = None if values.is_null("sliding_window") else 4096
    window = values.take("sliding_window", int, default)
    if window is not None and window < 1:
        raise values.error(f"sliding_window={window}", "must be at least 1, or null", "correct it")
    if family == "gemma2":  # old files have both names
        values.refuse_other("sliding_window_size", (window,), f"it must equal sliding_window={window}")
    types = values.take("layer_types", list, None)
    if types is not None:
        accepted = [each for each in types if each in (FULL, SLIDING)]
        if len(accepted) != layers or len(types) != layers:
            rule = f"must be a list of {layers} times {FULL!r} or {SLIDING!r}, one per layer"
            raise values.error(f"layer_types (of {len(types)})", rule, "correct it")
    implied = _implied_types(values, family, layers, window)
    if family == "mistral" and types is not None and types != implied:
        rule = f"is not supported: all layers of Mistral have sliding_window={window}"
        raise values.error("layer_types", rule, "remove it")
    types = implied if types is None else types
    if SLIDING not in types:
        return None, None
    if window is None or (family in ("qwen2", "qwen3") and not values.values.get("use_sliding_window", False)):
        problem = f"has {SLIDING!r} layers, but sliding_window or use_sliding_window is not set"
        raise values.error("layer_types", problem, "set both, or use full_attention")
    kinds: tuple[LayerKind, ...] = tuple("window" if each == SLIDING else "full" for each in types)
    return window - 1, shortest_pattern(kinds)


def _implied_types(values: Values, family: FamilyName, layers: int, window: int | None) -> list[str]:
    """Returns the types of layers that transformers gives a config without `layer_types`."""
    if family == "mistral":
        return [FULL if window is None else SLIDING] * layers
    if family in ("qwen2", "qwen3"):
        uses_window = values.take("use_sliding_window", bool, False)
        first = values.take("max_window_layers", int, 28)
        return [SLIDING if uses_window and window is not None and layer >= first else FULL for layer in range(layers)]
    period = 2
    if family == "gemma3":
        old = values.take("_sliding_window_pattern", int, 6)
        period = values.take("sliding_window_pattern", int, old)
        if period < 1:
            raise values.error(f"sliding_window_pattern={period}", "must be at least 1", "correct it")
    return [SLIDING if (layer + 1) % period else FULL for layer in range(layers)]


def shortest_pattern(kinds: tuple[LayerKind, ...]) -> tuple[LayerKind, ...]:
    """Returns the shortest pattern that gives `kinds` if it is repeated and cut off."""
    layers = len(kinds)
    fitting = (n for n in range(1, layers + 1) if all(kinds[i] == kinds[i % n] for i in range(layers)))
    return kinds[: next(fitting)]


def write_config(c: config.Model, context: int, dtype: str) -> dict[str, Any]:
    """Returns the content of config.json. `c.vocabulary` must be set; `context` is max_position_embeddings.

    Raises ValueError for a model that transformers cannot represent.
    """
    pattern = layer_pattern(c)
    kinds: list[LayerKind] = [pattern[layer % len(pattern)] for layer in range(c.layers)]
    family: FamilyName = c.family
    if family == "llama" and "window" in kinds:  # which is Mistral, apart from the window
        family = "mistral"
    _check_representable(c, family, kinds)
    activation = ACTIVATIONS[FAMILIES[family].activation][0]
    if c.rope_scaling == "yarn":  # from which older transformers compute the factor
        context = round(c.rope_original * c.rope_factor)
    content: dict[str, Any] = {
        "architectures": [NAMES[family].architecture],
        "model_type": NAMES[family].model_type,
        "vocab_size": c.vocabulary,
        "hidden_size": c.dim,
        "intermediate_size": c.feed_forward,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_dim,
        "hidden_act": activation,
        "max_position_embeddings": context,
        "rms_norm_eps": c.norm_epsilon,
        "tie_word_embeddings": c.tied,
        "attention_dropout": 0.0,
        "torch_dtype": dtype,
    }
    content |= write_rope(c)
    if family not in ("mistral", "qwen2"):
        content["attention_bias"] = False
    if family == "llama":
        content["mlp_bias"] = False
    else:
        content |= _write_window(c, family, kinds)
    if family in GEMMA:
        scale = c.head_dim**-0.5 if c.query_scale is None else c.query_scale
        scalar = scale**-2
        content |= {"hidden_activation": activation, "query_pre_attn_scalar": _as_integer(scalar)}
        content |= {"attn_logit_softcapping": attention_soft_cap(c), "final_logit_softcapping": output_soft_cap(c)}
    return content


def _as_integer(value: float) -> float | int:
    """Returns an integer if rounding errors alone separate it from one, as transformers requires of some fields."""
    return round(value) if abs(value - round(value)) < 1e-9 * value else value


def _write_window(c: config.Model, family: FamilyName, kinds: list[LayerKind]) -> dict[str, Any]:
    """Returns the fields of window layers."""
    types = [SLIDING if kind == "window" else FULL for kind in kinds]
    fields: dict[str, Any] = {"sliding_window": None if c.window is None else c.window + 1}
    if family in ("qwen2", "qwen3"):
        fields |= {"use_sliding_window": "window" in kinds, "max_window_layers": c.layers, "layer_types": types}
    if family in GEMMA:
        fields |= {"layer_types": types, "sliding_window": 4096 if c.window is None else c.window + 1}
    if family == "gemma3":
        fields["rope_local_base_freq"] = c.rope_theta if c.rope_local_theta is None else c.rope_local_theta
    return fields


def _check_representable(c: config.Model, family: FamilyName, kinds: list[LayerKind]) -> None:
    """Raises ValueError if transformers' class of the family cannot compute the model `c`."""

    def require(holds: bool, field: str, rule: str) -> None:
        if not holds:
            problem = f"model.{field}={vars(c)[field]!r} cannot be written for transformers"
            raise ValueError(
                f"{problem}: {NAMES[family].architecture} {rule}; train a model without it, or keep the run"
            )

    if family in ("llama", "mistral"):
        require(len(set(kinds)) == 1, "pattern", "has layers of one kind")
    if family not in GEMMA:
        default = c.query_scale is None or abs(c.query_scale * c.head_dim**0.5 - 1) < 1e-6
        require(default, "query_scale", "scales logits by head_dim ** -0.5")
        require(output_soft_cap(c) is None, "final_soft_cap", "has no soft cap")
    if family != "gemma2":
        require(attention_soft_cap(c) is None, "soft_cap", "has no soft cap of attention logits")
    if family == "gemma3":
        same = c.rope_local_theta is not None or c.rope_scaling == "none" or "window" not in kinds
        require(same, "rope_local_theta", "does not scale the RoPE of window layers")
    else:
        require(c.rope_local_theta is None, "rope_local_theta", "has one RoPE base")
    if family in ("llama", *GEMMA):
        require(c.dim % c.heads == 0, "dim", f"needs a multiple of model.heads={c.heads}")
