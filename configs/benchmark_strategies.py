"""Layouts and strategies among themselves: the ring in three layouts, gathered keys and values, heads for sequence.

    python scripts/benchmark.py --config configs/benchmark_strategies.py

Expect about equal times where simulated devices share a processor, and gather to need the most memory. Ulysses gives
each of the 8 devices one of the 8 heads; with fewer heads it would be left out.
"""

from dataclasses import replace

from benchmark import config as benchmark

config = replace(
    benchmark,
    name="benchmark_strategies",
    shard_tokens=(512, 1024),
    subjects=("ring zigzag", "ring striped", "ring contiguous", "gather contiguous", "ulysses contiguous"),
    baselines=("ring contiguous",),
)
