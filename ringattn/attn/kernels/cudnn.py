"""cuDNN's fused attention, for GPUs: bfloat16, under masks that `products` can split into full and diagonal products.

cuDNN returns lse in float32, but outputs and gradients in bfloat16. Each product is therefore rounded once, by a
relative error of up to 2**-9, before it is merged in float32. The backward pass takes the output and lse of the whole
sequence, so the gradients of its products add up. JAX has this backward pass only in private functions.
"""

import inspect
import re
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ringattn.attn.kernels.products import Range, extra_rows, products, refusal
from ringattn.attn.kernels.protocol import (
    KV,
    Kernel,
    KVGrads,
    LogitSpec,
    Queries,
    QueryGrads,
    Residuals,
    Slopes,
    init_partial,
    init_query_grads,
    zeros,
)
from ringattn.attn.kernels.tiles import pad
from ringattn.attn.softmax import Partial, merge, varying_like
from ringattn.hardware import platform

private: Any = None
with suppress(ImportError):  # a later version of JAX may not have it: `check_signatures` refuses None
    private = import_module("jax._src.cudnn.fused_attention_stablehlo")

DTYPES = ("bfloat16",)
MAX_HEAD_DIM = 128
REFUSED_GPUS = re.compile(r"AMD |Tesla |Quadro (?!RTX A)|TITAN|GeForce (GT|MX|RTX 20)|NVIDIA T\d+|[VP]100|GV100|GP100")
"""The `device_kind` of GPUs before Ampere, and of those without cuDNN."""
ARRAYS = "query, key, value, bias, q_seqlen, kv_seqlen, q_offsets, kv_offsets, page_table_k, page_table_v"
OPTIONS = "scale, seed, dropout_rate, variadic_args, mask_type, layout, sliding_window_length"
SIGNATURES = (
    (  # jax 0.10 and 0.11
        f"{ARRAYS}, {OPTIONS}, cudnn_version, return_residual",
        f"{OPTIONS}, is_training, return_residual, res, grad_output",
    ),
    (  # jax 0.12
        f"{ARRAYS}, score_mod_args, {OPTIONS}, score_mod, cudnn_version, return_residual",
        f"{OPTIONS}, score_mod, cudnn_version, return_residual, res, grad_output",
    ),
)
"""Parameters of `_dot_product_attention_fwd` and `_dot_product_attention_bwd_rule` in known versions of JAX."""


def check_signatures(module: Any) -> str | None:
    """Returns why the private functions of `module` cannot be called, as the end of a sentence; None if they can."""
    try:
        functions = module._dot_product_attention_fwd, module._dot_product_attention_bwd_rule
        found = tuple(", ".join(inspect.signature(function).parameters) for function in functions)
    except AttributeError:
        found = None
    if found in SIGNATURES:
        return None
    return f"calls private functions that jax {jax.__version__} has changed; jax 0.10 to 0.12.0 are known"


SIGNATURE_REFUSAL = check_signatures(private)


@dataclass(frozen=True)
class Fused:
    """One cuDNN call, forward or backward. Only this class calls JAX's private functions.

    If `causal`, query i sees keys i - `window` to i, by index; all earlier keys if `window` is None.
    """

    scale: float
    causal: bool
    window: int | None

    def forward(
        self, query: Float[Array, "B H L D"], key: Float[Array, "B G M D"], value: Float[Array, "B G M D"]
    ) -> tuple[Float[Array, "B H L D"], Float[Array, "B H L"]]:
        """Returns the output in query's dtype, and lse in float32."""
        arrays = self._arrays(query, key, value)
        return self._call(private._dot_product_attention_fwd, **arrays, return_residual=True)

    def backward(
        self,
        query: Float[Array, "B H L D"],
        key: Float[Array, "B G M D"],
        value: Float[Array, "B G M D"],
        out: Float[Array, "B H L D"],
        lse: Float[Array, "B H L"],
        d_out: Float[Array, "B H L D"],
    ) -> tuple[Float[Array, "B H L D"], Float[Array, "B G M D"], Float[Array, "B G M D"]]:
        """Returns the gradients of query, key and value in their dtype. `out` and `lse` may cover more keys."""
        arrays = self._arrays(query, key, value)
        names = inspect.signature(private._dot_product_attention_fwd).parameters
        res = (*(arrays[name] for name in names if name in arrays), lse, out)
        given = {"is_training": True, "return_residual": False, "res": res, "grad_output": d_out}
        return self._call(private._dot_product_attention_bwd_rule, **given)[:3]

    def _arrays(self, query: Array, key: Array, value: Array) -> dict[str, Any]:
        unused = dict.fromkeys(ARRAYS.split(", "), jnp.zeros(0, query.dtype))
        return unused | {"query": query, "key": key, "value": value, "score_mod_args": ()}

    def _call(self, function: Any, **given: Any) -> Any:
        arguments = {
            "scale": self.scale,
            "seed": 42,
            "dropout_rate": 0.0,
            "variadic_args": (False, False),  # no bias, no gradient of a bias
            "mask_type": private.MaskType.CAUSAL if self.causal else private.MaskType.NO_MASK,
            "layout": private.AttentionLayout.BNTH.value,
            "sliding_window_length": None if self.window is None else self.window + 1,
            "score_mod": None,
            "cudnn_version": private.check_cudnn_version(),
            **given,
        }
        return function(**{name: arguments[name] for name in inspect.signature(function).parameters})


def why_never(head_dim: int, dtype: str, device_kind: str) -> str | None:
    """Returns why cuDNN can compute nothing for these inputs, as the end of a sentence; None if it may."""
    if SIGNATURE_REFUSAL is not None:
        return SIGNATURE_REFUSAL
    if platform(device_kind) != "gpu" or REFUSED_GPUS.search(device_kind):
        return f"takes NVIDIA GPUs of compute capability 8.0 or newer, and this device is {device_kind}"
    if dtype not in DTYPES:
        return f"takes {' and '.join(DTYPES)}, and the inputs are {dtype}"
    if head_dim > MAX_HEAD_DIM or head_dim % 8:
        return f"takes head dims up to {MAX_HEAD_DIM} that are multiples of 8, and the inputs have {head_dim}"
    return None


def why_not(spec: LogitSpec, queries: Queries, kv: KV, slopes: Slopes | None) -> str | None:
    """Returns why cuDNN cannot compute attention of `queries` to `kv`, as the end of a sentence; None if it can.

    Reads shapes and what is static of the tokens. Assumes that `why_never` returns None.
    """
    D = queries.query.shape[-1]
    if kv.value.shape[-1] != D:
        return f"takes values with the head dim of the keys, {D}, and value has {kv.value.shape[-1]}"
    if spec.soft_cap is not None:
        return "takes no soft_cap"
    if slopes is not None:
        return "takes no slopes"
    return refusal(spec.mask, queries, kv)


@dataclass(frozen=True)
class Cudnn:
    """The kernel for GPUs.

    `fallback` computes the calls that cuDNN cannot compute (`why_not`). None: such a call raises ValueError.
    """

    fallback: Kernel | None

    def forward(
        self,
        spec: LogitSpec,
        queries: Queries,
        kv: KV,
        slopes: Slopes | None,
        carry: Partial | None,
        dtype: DTypeLike | None = None,
    ) -> Partial:
        """See `protocol.Kernel.forward`."""
        if (other := self._other(why_not(spec, queries, kv, slopes))) is not None:
            return other.forward(spec, queries, kv, slopes, carry, dtype)
        carry = carry or init_partial(queries, kv, slopes)
        length = queries.query.shape[3]
        query, out, lse = (pad(x, 3, length + extra_rows(spec.mask, kv)) for x in (queries.query, *carry))
        part = Partial(out, lse)
        for q_range, kv_range, causal, kept in products(spec.mask, queries, kv):
            fused = Fused(spec.scale, causal, spec.mask.left if causal else None)
            key, value = (kv_range.of(x, 2) for x in (kv.key, kv.value))
            old = Partial(*(q_range.of(x, 3) for x in part))
            out, lse = fused.forward(_merge_heads(q_range.of(query, 3)), key, value)
            new = Partial(*(_sum_like(x, y) for x, y in zip((out, lse), old, strict=True)))
            if kept is not None:  # its output may be NaN, and a weight of 0 would not remove that
                new = Partial(jnp.where(kept, new.out, 0.0), jnp.where(kept, new.lse, -jnp.inf))
            part = Partial(*(q_range.set_in(x, y, 3) for x, y in zip(part, merge(old, new), strict=True)))
        return Partial(part.out[:, :, :, :length].astype(dtype or part.out.dtype), part.lse[..., :length])

    def backward(
        self,
        spec: LogitSpec,
        queries: Queries,
        kv: KV,
        slopes: Slopes | None,
        residuals: Residuals,
        carry: QueryGrads | None,
        dtype: DTypeLike | None = None,
    ) -> tuple[QueryGrads, KVGrads]:
        """See `protocol.Kernel.backward`."""
        if (other := self._other(why_not(spec, queries, kv, slopes))) is not None:
            return other.backward(spec, queries, kv, slopes, residuals, carry, dtype)
        length, carry = queries.query.shape[3], carry or init_query_grads(queries, kv, slopes)
        q_side = queries.query, residuals.out, residuals.lse, residuals.d_out, carry.query
        *q_side, d_query = (pad(x, 3, length + extra_rows(spec.mask, kv)) for x in q_side)
        d_key, d_value = (zeros(x.shape, queries, kv) for x in (kv.key, kv.value))
        for q_range, kv_range, causal, kept in products(spec.mask, queries, kv):
            fused = Fused(spec.scale, causal, spec.mask.left if causal else None)
            query, out, lse, d_out = (_merge_heads(q_range.of(x, 3)) for x in q_side)
            key, value = (kv_range.of(x, 2) for x in (kv.key, kv.value))
            grads = fused.backward(query, key, value, out, lse, d_out)
            if kept is not None:  # not by zeros in d_out: the probabilities of a discarded product may be infinite
                grads = [jnp.where(kept, x, 0) for x in grads]
            d_query = _add(d_query, q_range, grads[0], 3)
            d_key, d_value = (_add(x, kv_range, y, 2) for x, y in zip((d_key, d_value), grads[1:], strict=True))
        d_query = d_query[:, :, :, :length].astype(dtype or d_query.dtype)
        return carry._replace(query=d_query), KVGrads(d_key, d_value)

    def _other(self, refusal: str | None) -> Kernel | None:
        """Returns the kernel to use instead of cuDNN; None if there is no refusal."""
        if refusal is not None and self.fallback is None:
            raise ValueError(f"kernel='cudnn' {refusal}; use kernel='auto', which computes this with 'xla'")
        return None if refusal is None else self.fallback


def _merge_heads(x: Float[Array, "B G R *rest"]) -> Float[Array, "B H *rest"]:
    return rearrange(x, "B G R ... -> B (G R) ...")


def _sum_like(x: Array, total: Array) -> Array:
    """Returns x in the shape, the dtype and the varying mesh axes of `total`."""
    return varying_like(x.reshape(total.shape).astype(total.dtype), total)


def _add(total: Array, tokens: Range, x: Array, dim: int) -> Array:
    """Returns `total` with x added to a range of its tokens."""
    old = tokens.of(total, dim)
    return tokens.set_in(total, old + _sum_like(x, old), dim)
