"""`ringattn.attention` in the shape of Flax's `attention_fn`, for `flax.nnx.MultiHeadAttention`."""

from dataclasses import replace
from typing import Any

from jaxtyping import Array, Float

from ringattn.attention import Mask, attention


def flax_attention(
    query: Float[Array, "B L H D"],
    key: Float[Array, "B L G D"],
    value: Float[Array, "B L G Dv"],
    bias: Any = None,
    mask: Any = None,
    *,
    is_causal: bool = False,
    masking: Mask = Mask(causal=False),
    dropout_rate: float = 0.0,
    deterministic: bool = True,
    module: Any = None,
    dropout_rng: Any = None,
    broadcast_dropout: Any = None,
    dtype: Any = None,
    precision: Any = None,
    **options: Any,
) -> Float[Array, "B L H Dv"]:
    """Attention over the context axis, as `attention_fn` of `flax.nnx.MultiHeadAttention`.

    Flax gives all but `masking` and `options`; bind these by `functools.partial`.

    Args:
      query, key, value: as of `ringattn.attention`.
      is_causal: as Flax's caller says; adds causality to `masking`.
      masking: window, chunk and causality; what `ringattn.attention` calls `mask`, a name that Flax has taken.
      dtype: query, key and value are cast to it, as Flax does.
      options: keyword arguments of `ringattn.attention`: segment_ids, layout, strategy, axis, spec, ...

    Raises:
      ValueError: for what a ring cannot keep: an array as mask or bias, dropout, sown attention weights; and as
        `ringattn.attention` does.
    """
    for name, array in {"mask": mask, "bias": bias}.items():
        if array is not None:
            cure = "masking=ringattn.Mask(...), segment_ids, span_ids or slopes, bound by functools.partial"
            raise ValueError(f"{name} {array.shape} has an entry for each pair of tokens, too many to hold: use {cure}")
    if dropout_rate > 0 and not deterministic:
        raise ValueError(f"dropout_rate={dropout_rate} on attention weights is not supported: use dropout_rate=0.0")
    if module is not None:
        raise ValueError("sow_weights=True would keep L x L attention weights, which no device holds: leave it out")
    if dtype is not None:
        query, key, value = (x.astype(dtype) for x in (query, key, value))
    masking = replace(masking, causal=masking.causal or is_causal)
    return attention(query, key, value, mask=masking, **options)
