"""Benchmarks a ring over all GPUs or TPUs of a host, with the attention shape of a large model, in bfloat16.

    python scripts/benchmark.py --config configs/benchmark_accelerator.py

Dense attention runs on one device. On a single device nothing rotates, so the benchmark compares the kernels.
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
