"""`ringattn.attention` as `attention_fn` of `flax.nnx.MultiHeadAttention`."""

import reprlib
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
    key: Float[Array, "B M G D"],
    value: Float[Array, "B M G Dv"],
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    *,
    is_causal: bool = False,
    masking: Mask | None = None,
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

    Bind `masking`, which is required, and `options` with `functools.partial`, as in
    `attention_fn=partial(flax_attention, masking=Mask(causal=True))`. Flax passes all other arguments and
    overrides those that `partial` binds: it calls `partial(flax_attention, mask=...)` with `mask=None`. Without
    `masking`, `flax_attention` therefore raises an error, because the bound mask would be ignored.

    Args:
      query, key, value: as in `ringattn.attention`.
      masking: the `mask` argument of `ringattn.attention`. Flax uses the name `mask` for an array. Flax's own attention
        functions correspond to `Mask(causal=False)`, and the default of `ringattn.attention` to `Mask(causal=True)`.
      is_causal: passed by Flax. True makes `masking` causal. Requires as many queries as keys: otherwise Flax aligns
        the first query with the first key, and ringattn the last query with the last key.
      dtype: dtype to which query, key and value are cast, as in Flax.
      precision: has no effect. Products of float32 arrays always use the highest precision.
      options: other keyword arguments of `ringattn.attention`: segment_ids, layout, strategy, axis, spec, ...

    Raises:
      ValueError: without `masking`; for a mask or bias array, for dropout and for sown attention weights, which a ring
        does not support; also in all cases in which `ringattn.attention` raises it.
    """
    fix = "bind masking=ringattn.Mask(...), segment_ids, span_ids or slopes by functools.partial"
    if isinstance(mask, Mask | str):
        raise ValueError(f"mask={mask!r} must be None, because Flax uses this name for an array; {fix}")
    for name, array in {"mask": mask, "bias": bias}.items():
        if array is not None:
            raise ValueError(f"{name}.shape={array.shape} must not have an entry per pair of tokens; {fix}")
    if dropout_rate > 0 and not deterministic:
        raise ValueError(f"dropout_rate={dropout_rate} on attention weights is not supported; use dropout_rate=0.0")
    if module is not None:
        raise ValueError(
            "sow_weights=True would store L x L attention weights, which do not fit; use sow_weights=False"
        )
    if not isinstance(masking, Mask):
        fix = "partial(ringattn.flax_attention, masking=Mask(causal=True)), or causal=False, which is Flax's default"
        reason = "a mask or is_causal that is bound instead is ignored, because Flax passes its own"
        raise ValueError(f"masking={reprlib.repr(masking)} must be a ringattn.Mask; use {fix}; {reason}")
    if is_causal and query.shape[1] != key.shape[1]:
        rule = f"needs as many queries as keys, not {query.shape[1]} and {key.shape[1]}"
        fix = "use masking=Mask(causal=True), whose last query sees all keys, and is_causal=False"
        raise ValueError(f"is_causal=True {rule}; {fix}")
    if dtype is not None:
        query, key, value = (x.astype(dtype) for x in (query, key, value))
    masking = replace(masking, causal=masking.causal or is_causal)
    return attention(query, key, value, mask=masking, **options)
