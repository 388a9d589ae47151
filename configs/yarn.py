"""Extends a model from rows of 1,024 bytes to rows of 4,096 in 50 steps, with YaRN scaling of RoPE.

    python scripts/train.py --config configs/yarn.py

The second stage uses a nested ring: two rings of four devices. Compare with --stages.2.rope_scaling linear.
Expect about two minutes on two CPU cores.
"""

from dataclasses import replace

from quickstart import config as quickstart

from ringattn.config import Stage

config = replace(
    quickstart,
    name="yarn",
    model=replace(quickstart.model, rope_original=1024),
    stages=(
        Stage(steps=200, seq_len=1024, batch_size=4, data=4, context=2),
        Stage(
            steps=50,
            seq_len=4096,
            batch_size=1,
            learning_rate=1e-3,
            rope_scaling="yarn",
            rope_factor=4.0,
            data=1,
            context_outer=2,
            context=4,
        ),
    ),
)
