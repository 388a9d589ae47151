"""Rings of 1, 2, 4 and 8 devices, each device with 1,024 tokens: what grows with the ring, and what does not.

    python scripts/benchmark.py --config configs/benchmark_rings.py

Expect a ring's temporary memory to level off, and that of gathered keys and values to go on growing. Time grows as
the square of the ring, for simulated devices share the processor; on real ones it grows as the ring.
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
