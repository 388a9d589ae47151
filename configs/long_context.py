"""Rows of 16,384 bytes over a ring of 8 simulated devices: eight times the quickstart's context.

    python scripts/train.py --config configs/long_context.py

Each device holds 2,048 tokens, a whole row of the quickstart's. Expect longer steps, for attention's work grows with
the square of the row. rope_theta is raised, so that positions thousands of bytes apart still turn a head's slow pairs
by different angles.
"""

from dataclasses import replace

from quickstart import config as quickstart

config = replace(
    quickstart,
    name="long_context",
    model=replace(quickstart.model, rope_theta=100_000.0),
    data=replace(quickstart.data, seq_len=16_384, validation=0.1),
    train=replace(quickstart.train, steps=100, batch_size=1),
)
