"""Model families: what differs between Llama, Mistral, Qwen and Gemma, as data.

A family fixes the parts of a model that no config field describes, and the defaults of `model.pattern`,
`model.soft_cap` and `model.final_soft_cap`. The modules of `transformer.py` read it; there is no class per family.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypedDict

import jax
from jaxtyping import Array, Float

from ringattn import config
from ringattn.attn.mask import Mask
from ringattn.config.choices import FamilyName, LayerKind

Activation = Callable[[Float[Array, "*dims"]], Float[Array, "*dims"]]

ACTIVATIONS: dict[str, Activation] = {"silu": jax.nn.silu, "gelu": partial(jax.nn.gelu, approximate=True)}
"""Activations of the feed-forward network. gelu is the tanh approximation, as in Gemma."""


class LogitOptions(TypedDict):
    """Arguments of `ringattn.attention`."""

    mask: Mask
    scale: float | None
    soft_cap: float | None


@dataclass(frozen=True)
class Family:
    """Differences of a model family from Llama. The defaults are those of Llama."""

    qkv_bias: bool = False
    """Queries, keys and values have a bias."""
    qk_norm: bool = False
    """RMSNorm over the head dim of queries and keys, before RoPE."""
    unit_offset: bool = False
    """RMSNorm multiplies by 1 + scale, and scales are initialized to 0."""
    post_norms: bool = False
    """RMSNorm of the outputs of attention and of the feed-forward network, before each residual sum."""
    scaled_embedding: bool = False
    """Embeddings are multiplied by sqrt(dim), rounded to the compute dtype."""
    activation: str = "silu"
    """Activation of the feed-forward gate: a key of ACTIVATIONS."""
    pattern: tuple[LayerKind, ...] = ("window",)
    """Default of `model.pattern` if the config has a window."""
    soft_cap: float = 0.0
    """Default of `model.soft_cap`; 0: no cap."""
    final_soft_cap: float = 0.0
    """Default of `model.final_soft_cap`; 0: no cap."""


_GEMMA = partial(Family, unit_offset=True, post_norms=True, scaled_embedding=True, activation="gelu")

FAMILIES: dict[FamilyName, Family] = {
    "llama": Family(),  # arXiv 2302.13971, 2307.09288, 2407.21783; also SmolLM2
    "mistral": Family(),  # arXiv 2310.06825
    "qwen2": Family(qkv_bias=True),  # arXiv 2407.10671
    "qwen3": Family(qk_norm=True),  # arXiv 2505.09388
    "gemma2": _GEMMA(pattern=("window", "full"), soft_cap=50.0, final_soft_cap=30.0),  # arXiv 2408.00118
    "gemma3": _GEMMA(qk_norm=True, pattern=("window",) * 5 + ("full",)),  # arXiv 2503.19786
}


def layer_pattern(c: config.Model) -> tuple[LayerKind, ...]:
    """Returns the kinds of layers that repeat: layer i has kind pattern[i % len(pattern)]."""
    if c.pattern is not None:
        return c.pattern
    return ("full",) if c.window is None else FAMILIES[c.family].pattern


def layer_kinds(c: config.Model) -> dict[LayerKind, int]:
    """Returns the number of layers of each kind that the model has, in the order of their first layers."""
    pattern = layer_pattern(c)
    kinds: list[LayerKind] = [pattern[layer % len(pattern)] for layer in range(c.layers)]
    return {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}


def layer_mask(c: config.Model, kind: LayerKind) -> Mask:
    """Returns the mask of the layers of a kind: causal, in window layers with the window of the config."""
    return Mask(causal=True, window=None if kind == "full" or c.window is None else (c.window, 0))


def attention_soft_cap(c: config.Model) -> float | None:
    """Returns the soft cap of the attention logits; None: no cap."""
    return (FAMILIES[c.family].soft_cap if c.soft_cap is None else c.soft_cap) or None


def logit_options(c: config.Model, kind: LayerKind) -> LogitOptions:
    """Returns the arguments mask, scale and soft_cap of attention in the layers of a kind."""
    return {"mask": layer_mask(c, kind), "scale": c.query_scale, "soft_cap": attention_soft_cap(c)}


def output_soft_cap(c: config.Model) -> float | None:
    """Returns the soft cap of the output logits; None: no cap."""
    return (FAMILIES[c.family].final_soft_cap if c.final_soft_cap is None else c.final_soft_cap) or None
