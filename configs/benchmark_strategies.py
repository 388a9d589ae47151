"""Compares ring attention in three layouts, all-gathered K/V, and Ulysses (all-to-all between sequence and heads).

    python scripts/benchmark.py --config configs/benchmark_strategies.py

Expect similar times, because simulated devices share the CPU, and the most memory for gather. Ulysses assigns one of
the 8 heads to each of the 8 devices; with fewer heads it is skipped.
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
