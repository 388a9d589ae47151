"""The model section of a training config: shape, family, layer pattern and position embedding."""

from ringattn.config.checks import at_least, check_types, nearest_multiples, option, require, section
from ringattn.config.choices import Dtype, FamilyName, LayerKind, Remat, RopeScaling

MAX_WINDOW = 2**30
"""Maximum of `window`: positions and their differences are int32."""


@section("model.")
class Model:
    weights: str | None = None
    """Checkpoint to start from: a Hugging Face directory, a .gguf file or a run directory. It sets the other fields,
    except for dtype, remat, head_groups and RoPE fields given here, and data.tokenizer. None: random weights."""
    family: FamilyName = "llama"
    """Model family: biases, norms, activation and embedding scale, and defaults of pattern, soft_cap and
    final_soft_cap."""
    layers: int = 4
    """Number of transformer layers."""
    dim: int = 256
    """Model dimension (E), the width of the residual stream."""
    heads: int = 8
    """Number of query heads (H); must be a multiple of kv_heads."""
    kv_heads: int = 4
    """Number of key/value heads (G)."""
    head_dim: int = 32
    """Head dimension (D); must be even."""
    feed_forward: int = 768
    """Hidden dimension of the gated feed-forward layer (F)."""
    vocabulary: int | None = None
    """Vocabulary size (V). None: the size of the tokenizer's vocabulary."""
    window: int | None = None
    """Sliding window: number of preceding tokens a token attends to, besides itself, in layers of kind window. None: no
    window."""
    pattern: tuple[LayerKind, ...] | None = None
    """Kinds of layers, such as window window full, repeated over the layers; the last repetition may be cut off.
    None: the pattern of the family if window is set, otherwise full."""
    rope_theta: float = 10_000.0
    """RoPE base frequency."""
    rope_local_theta: float | None = None
    """RoPE base frequency of window layers, to which rope_scaling does not apply. None: as in full layers."""
    rope_scaling: RopeScaling = "none"
    """RoPE scaling method for contexts beyond the training length."""
    rope_factor: float = 1.0
    """Ratio of context length to training length, for rope_scaling."""
    rope_original: int = 8192
    """Original training length in tokens, for rope_scaling yarn and llama3."""
    query_scale: float | None = None
    """Factor of the attention logits. None: head_dim ** -0.5."""
    soft_cap: float | None = None
    """Soft cap of the attention logits. 0: no cap; None: the value of the family."""
    final_soft_cap: float | None = None
    """Soft cap of the output logits. 0: no cap; None: the value of the family."""
    norm_epsilon: float = 1e-6
    """Number added to the mean square in RMSNorm."""
    tied: bool = True
    """Tie the output projection to the token embedding."""
    dtype: Dtype = "float32"
    """Compute dtype. Parameters, softmax and loss are always float32."""
    remat: Remat = "off"
    """Rematerialization. off: save all activations; on: save only each layer's input and attention output; offload:
    save these in host memory; offload_inputs: save only the inputs in host memory, and compute attention again;
    offload_groups: only the input of every group of at most 4 layers, and compute all again; auto: the fastest
    of these, by estimate, with which a train step fits."""
    head_groups: int = 1
    """Number of groups of heads whose attention is computed one after another. More groups need less memory for
    queries, keys, values and their gradients. Must divide kv_heads."""

    def __post_init__(self) -> None:
        check_types(self)
        rule = "a Hugging Face directory, a .gguf file or a run directory, or None for random weights"
        require(self.weights != "", self, "weights", rule)
        sizes = "layers", "dim", "heads", "kv_heads", "head_dim", "feed_forward", "rope_original", "head_groups"
        at_least(1, self, *sizes, at_most=2**31 - 1)  # JAX cannot describe larger shapes
        require(self.vocabulary is None or self.vocabulary >= 1, self, "vocabulary", "at least 1, or None")
        multiple = f"a multiple of model.kv_heads={self.kv_heads}; use {nearest_multiples(self.heads, self.kv_heads)}"
        require(self.heads % self.kv_heads == 0, self, "heads", multiple)
        divisor = f"a divisor of model.kv_heads={self.kv_heads}"
        require(self.kv_heads % self.head_groups == 0, self, "head_groups", divisor)
        # The TPU compiler cannot slice an array in host memory by layer and by group.
        rule = f"1, because model.remat={self.remat!r} keeps the output of attention in host memory; "
        rule += f"use {option('model.remat')} on or offload_inputs"
        require(self.head_groups == 1 or self.remat not in ("offload", "offload_groups"), self, "head_groups", rule)
        even = f"even, because RoPE rotates pairs of dimensions; use {nearest_multiples(self.head_dim, 2)}"
        require(self.head_dim % 2 == 0, self, "head_dim", even)
        self._check_window()
        self._check_rope()
        positive = "positive, or None for head_dim ** -0.5"
        require(self.query_scale is None or self.query_scale > 0, self, "query_scale", positive)
        for name in ("soft_cap", "final_soft_cap"):
            cap = vars(self)[name]
            require(cap is None or cap >= 0, self, name, "positive, 0 for no cap, or None for the value of the family")
        require(self.norm_epsilon > 0, self, "norm_epsilon", "positive, such as 1e-6")

    def _check_window(self) -> None:
        rule = f"from 0 to {MAX_WINDOW}, or None for no window"
        require(self.window is None or 0 <= self.window <= MAX_WINDOW, self, "window", rule)
        if self.pattern is not None and self.window is None:
            rule = "without 'window', because model.window=None; set model.window to a number of tokens, such as 512"
            require("window" not in self.pattern, self, "pattern", rule)
        if self.pattern is not None and "window" not in self.pattern:
            rule = f"None, because model.pattern={self.pattern} has no 'window' layer; add one, or leave the window out"
            require(self.window is None, self, "window", rule)

    def _check_rope(self) -> None:
        require(self.rope_theta > 1, self, "rope_theta", "more than 1, such as 10000")
        local = self.rope_local_theta
        require(local is None or local > 1, self, "rope_local_theta", "more than 1, such as 10000, or None")
        rule = "None, because model.window=None leaves no window layers; set model.window, such as 512"
        require(local is None or self.window is not None, self, "rope_local_theta", rule)
        ratio = "more than 1 with rope_scaling (context length / training length), such as 4"
        if self.rope_scaling == "none":
            ratio = f"1.0 without rope_scaling; set {option('model.rope_scaling')} to linear, ntk, yarn or llama3"
        require((self.rope_factor > 1) == (self.rope_scaling != "none"), self, "rope_factor", ratio)
