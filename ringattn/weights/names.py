"""Names of tensors, as tables: which tensor of a checkpoint is which parameter, and how its dims are arranged.

A pattern is one of einops: its left side is the stored tensor, its right side the parameter of one layer. Letters are
those of the model: V vocabulary, E model dim, H query heads, G key/value heads, D head dim, F feed-forward dim.
"""

from dataclasses import dataclass
from typing import NamedTuple

from ringattn import config
from ringattn.model.families import FAMILIES

LAYER = "{}"
"""Stands for the index of the layer in a name."""


class Rule(NamedTuple):
    """Maps one stored tensor, or one per layer, to a parameter."""

    name: str
    """Name of the stored tensor; LAYER stands for the index of the layer."""
    path: str
    """Path of the parameter. Those in `layers.` are stacked over the layers."""
    pattern: str
    """The einops pattern from the stored tensor to the parameter."""
    offset: float = 0.0
    """Value added to the stored values."""


@dataclass(frozen=True)
class Scheme:
    """The names of one file format."""

    model: tuple[Rule, ...]
    untied: tuple[Rule, ...]
    norms: tuple[Rule, ...]
    """Norms of families without `post_norms`."""
    post_norms: tuple[Rule, ...]
    """Norms of families with `post_norms`."""
    qkv_bias: tuple[Rule, ...]
    qk_norm: tuple[Rule, ...]


_PER_LAYER = "model.layers.{}."
HUGGING_FACE = Scheme(
    model=(
        Rule("model.embed_tokens.weight", "embedding", "V E -> V E"),
        Rule("model.norm.weight", "norm.scale", "E -> E"),
        Rule(_PER_LAYER + "self_attn.q_proj.weight", "layers.attention.query", "(H D) E -> E H D"),
        Rule(_PER_LAYER + "self_attn.k_proj.weight", "layers.attention.key", "(G D) E -> E G D"),
        Rule(_PER_LAYER + "self_attn.v_proj.weight", "layers.attention.value", "(G D) E -> E G D"),
        Rule(_PER_LAYER + "self_attn.o_proj.weight", "layers.attention.output", "E (H D) -> H D E"),
        Rule(_PER_LAYER + "mlp.gate_proj.weight", "layers.feed_forward.gate", "F E -> E F"),
        Rule(_PER_LAYER + "mlp.up_proj.weight", "layers.feed_forward.up", "F E -> E F"),
        Rule(_PER_LAYER + "mlp.down_proj.weight", "layers.feed_forward.down", "E F -> F E"),
    ),
    untied=(Rule("lm_head.weight", "unembedding", "V E -> V E"),),
    norms=(
        Rule(_PER_LAYER + "input_layernorm.weight", "layers.attention.norm.scale", "E -> E"),
        Rule(_PER_LAYER + "post_attention_layernorm.weight", "layers.feed_forward.norm.scale", "E -> E"),
    ),
    post_norms=(
        Rule(_PER_LAYER + "input_layernorm.weight", "layers.attention.norm.scale", "E -> E"),
        Rule(_PER_LAYER + "post_attention_layernorm.weight", "layers.attention.post_norm.scale", "E -> E"),
        Rule(_PER_LAYER + "pre_feedforward_layernorm.weight", "layers.feed_forward.norm.scale", "E -> E"),
        Rule(_PER_LAYER + "post_feedforward_layernorm.weight", "layers.feed_forward.post_norm.scale", "E -> E"),
    ),
    qkv_bias=(
        Rule(_PER_LAYER + "self_attn.q_proj.bias", "layers.attention.query_bias", "(H D) -> H D"),
        Rule(_PER_LAYER + "self_attn.k_proj.bias", "layers.attention.key_bias", "(G D) -> G D"),
        Rule(_PER_LAYER + "self_attn.v_proj.bias", "layers.attention.value_bias", "(G D) -> G D"),
    ),
    qk_norm=(
        Rule(_PER_LAYER + "self_attn.q_norm.weight", "layers.attention.query_norm.scale", "D -> D"),
        Rule(_PER_LAYER + "self_attn.k_norm.weight", "layers.attention.key_norm.scale", "D -> D"),
    ),
)
"""Names of Hugging Face's `model.safetensors`."""

GGUF = Scheme(
    model=(
        Rule("token_embd.weight", "embedding", "V E -> V E"),
        Rule("output_norm.weight", "norm.scale", "E -> E"),
        Rule("blk.{}.attn_q.weight", "layers.attention.query", "(H D) E -> E H D"),
        Rule("blk.{}.attn_k.weight", "layers.attention.key", "(G D) E -> E G D"),
        Rule("blk.{}.attn_v.weight", "layers.attention.value", "(G D) E -> E G D"),
        Rule("blk.{}.attn_output.weight", "layers.attention.output", "E (H D) -> H D E"),
        Rule("blk.{}.ffn_gate.weight", "layers.feed_forward.gate", "F E -> E F"),
        Rule("blk.{}.ffn_up.weight", "layers.feed_forward.up", "F E -> E F"),
        Rule("blk.{}.ffn_down.weight", "layers.feed_forward.down", "E F -> F E"),
    ),
    untied=(Rule("output.weight", "unembedding", "V E -> V E"),),
    norms=(
        Rule("blk.{}.attn_norm.weight", "layers.attention.norm.scale", "E -> E"),
        Rule("blk.{}.ffn_norm.weight", "layers.feed_forward.norm.scale", "E -> E"),
    ),
    post_norms=(
        Rule("blk.{}.attn_norm.weight", "layers.attention.norm.scale", "E -> E"),
        Rule("blk.{}.post_attention_norm.weight", "layers.attention.post_norm.scale", "E -> E"),
        Rule("blk.{}.ffn_norm.weight", "layers.feed_forward.norm.scale", "E -> E"),
        Rule("blk.{}.post_ffw_norm.weight", "layers.feed_forward.post_norm.scale", "E -> E"),
    ),
    qkv_bias=(
        Rule("blk.{}.attn_q.bias", "layers.attention.query_bias", "(H D) -> H D"),
        Rule("blk.{}.attn_k.bias", "layers.attention.key_bias", "(G D) -> G D"),
        Rule("blk.{}.attn_v.bias", "layers.attention.value_bias", "(G D) -> G D"),
    ),
    qk_norm=(
        Rule("blk.{}.attn_q_norm.weight", "layers.attention.query_norm.scale", "D -> D"),
        Rule("blk.{}.attn_k_norm.weight", "layers.attention.key_norm.scale", "D -> D"),
    ),
)
"""Names of llama.cpp's GGUF files; `gguf_rules` adds what llama.cpp changes in some families."""

IGNORED = ("model.rotary_emb.inv_freq", _PER_LAYER + "self_attn.rotary_emb.inv_freq")
"""Tensors of old Hugging Face checkpoints that are not parameters: they follow from config.json."""


def rules(scheme: Scheme, c: config.Model) -> tuple[Rule, ...]:
    """Returns the rules of all tensors of the model `c`."""
    family = FAMILIES[c.family]
    chosen = scheme.model + (scheme.post_norms if family.post_norms else scheme.norms)
    chosen += scheme.qkv_bias if family.qkv_bias else ()
    chosen += scheme.qk_norm if family.qk_norm else ()
    return chosen + (() if c.tied else scheme.untied)


def gguf_rules(c: config.Model) -> tuple[Rule, ...]:
    """Returns the rules of a GGUF file.

    llama.cpp stores 1 + w of Gemma's norms. For Llama and Mistral it orders the rows of a head for its own RoPE, which
    rotates neighbouring pairs: row 2 i + j of a head is row j * D / 2 + i of Hugging Face's.
    """

    def adapted(rule: Rule) -> Rule:
        if FAMILIES[c.family].unit_offset and rule.name.endswith("norm.weight"):
            return rule._replace(offset=-1.0)
        if c.family in ("llama", "mistral") and rule.path in ("layers.attention.query", "layers.attention.key"):
            heads = "H" if rule.path.endswith("query") else "G"
            return rule._replace(pattern=f"({heads} half pair) E -> E {heads} (pair half)")
        return rule

    return tuple(map(adapted, rules(GGUF, c)))


def letter_sizes(c: config.Model) -> dict[str, int]:
    """Returns the size of each letter in the patterns. `c.vocabulary` must be set."""
    assert c.vocabulary is not None
    sizes = {"V": c.vocabulary, "E": c.dim, "H": c.heads, "G": c.kv_heads, "D": c.head_dim, "F": c.feed_forward}
    return sizes | {"half": c.head_dim // 2, "pair": 2}
