"""All the GPUs or TPUs of a host as one ring, in the shape of a large model's layer, in bfloat16.

    python scripts/benchmark.py --config configs/benchmark_accelerator.py

Dense attention runs on one device. With a single device the ring is no ring, and its kernel is what is compared.
"""

from dataclasses import replace

from benchmark import config as benchmark

config = replace(
    benchmark,
    name="benchmark_accelerator",
    simulate=0,
    rings=(-1,),
    shard_tokens=(1024, 4096, 16384),
    subjects=("ring zigzag", "ring contiguous", "gather contiguous", "ulysses contiguous", "dense"),
    baselines=("dense",),
    heads=32,
    kv_heads=4,
    head_dim=128,
    dtype="bfloat16",
    seconds=20,
)
