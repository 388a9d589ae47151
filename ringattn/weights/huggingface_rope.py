"""Position embedding in config.json: the fields of transformers 4 (rope_theta, rope_scaling) and of transformers 5.

transformers 5 writes `rope_parameters`, for Gemma 3 one per type of layer.
"""

import math
from typing import Any, NamedTuple

from ringattn import config
from ringattn.model.rope import scaled_base, yarn_attention_factor
from ringattn.weights.untrusted import shortened
from ringattn.weights.values import Values

FULL, SLIDING = "full_attention", "sliding_attention"
THETA = {"gemma3": 1_000_000.0}
"""Default of rope_theta in families where it is not 10,000."""
LOCAL_THETA = 10_000.0
"""Default of rope_local_base_freq, which only Gemma 3 has."""
_PARAMETERS = {
    "default": (),
    "linear": ("factor",),
    "yarn": ("factor", "original_max_position_embeddings"),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
}
_YARN_CONSTANTS = ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate")


class Rope(NamedTuple):
    """The fields of config.Model that describe the position embedding."""

    rope_theta: float
    rope_scaling: str = "none"
    rope_factor: float = 1.0
    rope_original: int = 8192


def read_rope(values: Values, family: str, context: int) -> tuple[Rope, float | None]:
    """Returns the position embedding of full layers, and the RoPE base of window layers where it differs.

    `context` is max_position_embeddings. Raises ValueError for a form that ringattn does not implement.
    """
    both = values.take("rope_scaling", dict, None), values.take("rope_parameters", dict, None)
    if both[0] and both[1] and both[0] != both[1]:
        raise values.error("rope_scaling and rope_parameters", "contradict each other", "remove one of them")
    theta = values.take("rope_theta", float, THETA.get(family, 10_000.0))
    local = values.take("rope_local_base_freq", float, LOCAL_THETA) if family == "gemma3" else None
    parameters = both[0] or both[1] or {}
    if parameters.keys() & {FULL, SLIDING}:
        if family != "gemma3" or parameters.keys() - {FULL, SLIDING}:
            rule = f"must be one set of parameters in a model of family {family}"
            raise values.error(
                f"rope_parameters={shortened(sorted(parameters))}", rule, "use the config.json of the model"
            )
        nested = {name: parameters.get(name) or {} for name in (FULL, SLIDING)}
        if not all(isinstance(each, dict) for each in nested.values()):
            raise values.error("rope_parameters", "must be an object per type of layer", "download the file again")
        full, sliding = (Values(nested[name], f"{values.source}: rope_parameters.{name}") for name in (FULL, SLIDING))
        local = sliding.take("rope_theta", float, local)
        rope = _scaling(sliding, Rope(local), context)
        if rope.rope_scaling != "none":
            raise sliding.error(f"rope_type={rope.rope_scaling!r}", "is not supported in window layers", "use default")
        return _scaling(full, Rope(full.take("rope_theta", float, theta)), context), local
    if family == "gemma3" and both[1]:
        rule = f"must have {FULL} and {SLIDING} in a model of family gemma3"
        raise values.error("rope_parameters", rule, "use the config.json of the model")
    scaling = Values(parameters, f"{values.source}: {'rope_scaling' if both[0] else 'rope_parameters'}")
    if "rope_theta" in values and "rope_theta" in scaling and values.values["rope_theta"] != parameters["rope_theta"]:
        raise scaling.error(
            f"rope_theta={shortened(parameters['rope_theta'])}", f"contradicts rope_theta={theta}", "remove one"
        )
    return _scaling(scaling, Rope(scaling.take("rope_theta", float, theta)), context), local


def _scaling(values: Values, rope: Rope, context: int) -> Rope:
    """Returns `rope` with the scaling of one set of parameters."""
    kind = values.take("rope_type", str, values.take("type", str, "default"))
    if values.take("type", str, kind) != kind:
        raise values.error(
            f"type={shortened(values.values['type'])}", f"contradicts rope_type={shortened(kind)}", "remove one of them"
        )
    if kind not in _PARAMETERS:
        known = ", ".join(_PARAMETERS)
        raise values.error(
            f"rope_type={shortened(kind)}", "is not supported", f"supported are {known}; use such a model"
        )
    values.refuse_other("partial_rotary_factor", (1, 1.0), "all dims of a head are rotated")
    factor = values.take("factor", float, None) if "factor" in _PARAMETERS[kind] else 1.0
    original = context
    if "original_max_position_embeddings" in _PARAMETERS[kind]:
        original = values.take("original_max_position_embeddings", int, context)
        if original < 1:
            raise values.error(f"original_max_position_embeddings={original}", "must be at least 1", "correct it")
    if factor is None and kind == "yarn":
        factor = context / original
    if factor is None or factor < 1:
        raise values.error(f"factor={factor}", f"must be at least 1 with rope_type={kind!r}", "correct it")
    if kind == "llama3":
        values.refuse_other("low_freq_factor", (1, 1.0), "ringattn interpolates from 1 to 4 rotations")
        values.refuse_other("high_freq_factor", (4, 4.0), "ringattn interpolates from 1 to 4 rotations")
    if kind == "yarn":
        _check_yarn(values, factor)
    values.refuse_unused(frozenset())
    if kind == "default" or factor == 1:  # all methods are the identity at factor 1
        return rope
    return rope._replace(rope_scaling=kind, rope_factor=factor, rope_original=original)


def _check_yarn(values: Values, factor: float) -> None:
    """Raises ValueError for constants of YaRN other than those of the paper, which `model/rope.py` uses."""
    values.refuse_other("beta_fast", (32, 32.0), "ringattn uses the constant of the paper")
    values.refuse_other("beta_slow", (1, 1.0), "ringattn uses the constant of the paper")
    values.refuse_other("truncate", (True,), "ringattn rounds the range of dims, as the authors' code does")
    scale = values.take("attention_factor", float, None)
    mscale, all_dims = values.take("mscale", float, None), values.take("mscale_all_dim", float, None)
    expected = yarn_attention_factor(factor)
    if scale is None and mscale and all_dims:
        scale = (0.1 * mscale * math.log(factor) + 1) / (0.1 * all_dims * math.log(factor) + 1)
    if scale is not None and abs(scale - expected) > 1e-6:
        rule = f"is not supported: ringattn scales attention by 0.1 * ln(factor) + 1 = {expected:.6g}"
        raise values.error(f"attention_factor={scale:.6g}", rule, "remove attention_factor, mscale and mscale_all_dim")


def write_rope(c: config.Model) -> dict[str, Any]:
    """Returns the fields of config.json, in the form that transformers 4 and 5 both read."""
    scaling: dict[str, Any] | None = None
    if c.rope_scaling in ("linear", "yarn", "llama3"):
        scaling = {"rope_type": c.rope_scaling, "factor": c.rope_factor}
        if c.rope_scaling != "linear":
            scaling["original_max_position_embeddings"] = c.rope_original
        if c.rope_scaling == "llama3":
            scaling |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    return {"rope_theta": scaled_base(c), "rope_scaling": scaling}  # transformers has no type for NTK
