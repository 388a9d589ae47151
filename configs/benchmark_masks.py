"""Measures the speedup from a 512-token window and from 16 packed documents, in rows of up to 16,384 tokens.

    python scripts/benchmark.py --config configs/benchmark_masks.py

Expect both to be several times as fast as causal attention over the longest row, which does 16 times the work.
ringattention masks documents but still computes the masked pairs.
"""

from dataclasses import replace

from benchmark import config as benchmark

config = replace(
    benchmark,
    name="benchmark_masks",
    subjects=(
        "ring contiguous",
        "ring contiguous window=512",
        "ring contiguous documents=16",
        "ring zigzag",
        "ring zigzag documents=16",
        "ringattention documents=16",
    ),
    baselines=("ring contiguous", "ring zigzag"),
)
