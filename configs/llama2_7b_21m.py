"""Plans a 7B model with the architecture of Llama 2, as many K/V heads as query heads, on rows of 20,971,520 tokens.

    python scripts/plan.py --config configs/llama2_7b_21m.py --topology v5e:16x16

Expect it to fit on 256 chips with 15.75 GiB and a host's 44.7 GiB each. Attention runs by groups of 8 heads.
"""

from dataclasses import replace

from llama3_8b_1m import config as llama3

config = replace(
    llama3,
    name="llama2_7b_21m",
    model=replace(
        llama3.model,
        kv_heads=32,
        feed_forward=11008,
        vocabulary=32_000,
        rope_theta=10_000.0,
        rope_scaling="yarn",
        rope_original=4096,
        rope_factor=5120.0,
        remat="offload_inputs",
        head_groups=4,
    ),
    data=replace(llama3.data, seq_len=20_971_520),
)
