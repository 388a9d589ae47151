"""Plans the 8B model on rows of 10,485,760 tokens, with saved activations offloaded to host memory.

    python scripts/plan.py --config configs/llama3_8b_10m.py --topology v5p:4x4x4

Expect it to fit on 64 chips with 95.7 GiB each.
"""

from dataclasses import replace

from llama3_8b_1m import config as one_million

config = replace(
    one_million,
    name="llama3_8b_10m",
    model=replace(one_million.model, rope_factor=1280.0, remat="offload"),
    data=replace(one_million.data, seq_len=10_485_760),
)
