"""Counts cycles with the TPU compiler: kernels, passes of a ring, a layer and a training step. Needs no TPU.

    python scripts/benchmark.py --config configs/benchmark_cycles.py

Requires the TPU compiler, pip install -e '.[tpu]', and takes about half an hour on 2 cores, most of it for the training
steps; --steps None omits them. Add --topology v5p:2x2x2 or v6e:2x4 for other chips. Expect fewer cycles than JAX's
splash attention on v5e at D = 128, and a step of the 8B model at 0.77 of the peak, against 0.23 with kernel='xla'.
"""

from dataclasses import replace

from benchmark import config as benchmark

config = replace(
    benchmark,
    name="benchmark_cycles",
    topology="v5e:2x4",
    simulate=0,
    rings=(-1,),
    shard_tokens=(8192,),
    subjects=("ring zigzag", "ring contiguous window=1024", "ring zigzag documents=16"),
    baselines=("ring zigzag",),
    heads=32,
    kv_heads=8,
    head_dim=128,
    dtype="bfloat16",
    steps=("configs/llama3_8b_1m.py v5e:8x8", "configs/llama3_8b_10m.py v5p:4x4x4"),
)
