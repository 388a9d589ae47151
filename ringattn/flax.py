"""`ringattn.attention` as `attention_fn` of `flax.nnx.MultiHeadAttention`."""

from dataclasses import replace
from typing import Any

import jax
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ringattn.attn.attention import attention
from ringattn.attn.mask import Mask


def flax_attention(
    query: Float[Array, "B L H D"],
    key: Float[Array, "B L G D"],
    value: Float[Array, "B L G Dv"],
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    *,
    is_causal: bool = False,
    masking: Mask = Mask(causal=False),
    dropout_rate: float = 0.0,
    deterministic: bool = True,
    module: nnx.Module | None = None,
    dropout_rng: Any = None,
    broadcast_dropout: bool | None = None,
    dtype: DTypeLike | None = None,
    precision: Any = None,
    **options: Any,
) -> Float[Array, "B L H Dv"]:
    """Attention over the context axis, as `attention_fn` of `flax.nnx.MultiHeadAttention`.

    Flax passes all arguments except `masking` and `options`, which `functools.partial` can bind.

    Args:
      query, key, value: as in `ringattn.attention`.
      is_causal: passed by Flax. True makes `masking` causal.
      masking: the `mask` argument of `ringattn.attention`. Flax uses the name `mask` for an array.
      dtype: dtype to which query, key and value are cast, as in Flax.
      options: other keyword arguments of `ringattn.attention`: segment_ids, layout, strategy, axis, spec, ...

    Raises:
      ValueError: for a mask or bias array, for dropout and for sown attention weights, which a ring does not support;
        also in all cases in which `ringattn.attention` raises it.
    """
    for name, array in {"mask": mask, "bias": bias}.items():
        if array is not None:
            fix = "masking=ringattn.Mask(...), segment_ids, span_ids or slopes, bound by functools.partial"
            raise ValueError(f"{name}.shape={array.shape} must not have an entry per pair of tokens; use {fix}")
    if dropout_rate > 0 and not deterministic:
        raise ValueError(f"dropout_rate={dropout_rate} on attention weights is not supported; use dropout_rate=0.0")
    if module is not None:
        raise ValueError(
            "sow_weights=True would store L x L attention weights, which do not fit; use sow_weights=False"
        )
    if dtype is not None:
        query, key, value = (x.astype(dtype) for x in (query, key, value))
    masking = replace(masking, causal=masking.causal or is_causal)
    return attention(query, key, value, mask=masking, **options)
