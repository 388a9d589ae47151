"""Ring attention for JAX: exact attention over sequences that are sharded over many devices."""

from ringattn.attn.attention import attention
from ringattn.attn.auto import choose_strategy
from ringattn.attn.kernels.registry import choose_kernel
from ringattn.attn.mask import Mask
from ringattn.attn.sharded import shard_attention
from ringattn.flax import flax_attention
from ringattn.layout import permute, unpermute

__all__ = [
    "Mask",
    "attention",
    "choose_kernel",
    "choose_strategy",
    "flax_attention",
    "permute",
    "shard_attention",
    "unpermute",
]
