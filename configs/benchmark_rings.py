"""Measures time and memory on rings of 1, 2, 4 and 8 devices with 1,024 tokens per device.

    python scripts/benchmark.py --config configs/benchmark_rings.py

Expect temporary memory to level off for ring and to keep growing for gather. Time grows with the square of the ring
size, because simulated devices share the CPU; on real devices it grows linearly.
"""

from dataclasses import replace

from benchmark import config as benchmark

config = replace(
    benchmark,
    name="benchmark_rings",
    rings=(1, 2, 4, 8),
    shard_tokens=(1024,),
    subjects=("ring zigzag", "ring contiguous", "gather contiguous", "ulysses contiguous"),
    baselines=("gather contiguous",),
    seconds=20,
)
