"""Ring attention for JAX: exact attention over sequences that are spread over many devices."""

from ringattn.attention import Mask, attention, choose_strategy, shard_attention
from ringattn.flax import flax_attention
from ringattn.layout import permute, unpermute

__all__ = ["Mask", "attention", "choose_strategy", "flax_attention", "permute", "shard_attention", "unpermute"]
