"""Types of the fields that accept a fixed set of values."""

from typing import Literal

from ringattn.attn.choices import KernelName, Strategy
from ringattn.layout import Layout

FamilyName = Literal["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3"]
LayerKind = Literal["window", "full"]
RopeScaling = Literal["none", "linear", "ntk", "yarn", "llama3"]
Dtype = Literal["float32", "bfloat16"]
Remat = Literal["off", "on", "offload", "offload_inputs", "offload_groups", "auto"]
"""Values of `model.remat`, in order of their cost in time; auto: the fastest by estimate that fits."""
Resume = Literal["never", "auto", "must"]
Scoring = Literal["logits", "generation"]

__all__ = [
    "Dtype",
    "FamilyName",
    "KernelName",
    "LayerKind",
    "Layout",
    "Remat",
    "Resume",
    "RopeScaling",
    "Scoring",
    "Strategy",
]
