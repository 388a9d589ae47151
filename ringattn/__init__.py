"""Ring attention for JAX: exact attention over sequences that are spread over many devices."""

from ringattn.attention import Mask, attention, shard_attention
from ringattn.flax import flax_attention
from ringattn.layout import permute, unpermute

__all__ = ["Mask", "attention", "flax_attention", "permute", "shard_attention", "unpermute"]
