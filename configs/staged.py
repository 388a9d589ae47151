"""Context that grows: rows of 1,024, 2,048, then 4,096 bytes, on rings of 2, 4, then 8 simulated devices.

    python scripts/train.py --config configs/staged.py

The recipe of Large World Models (arXiv 2402.08268) in small: each stage begins with the weights of the one before, rows
are twice as long, the rotary base grows with them, and the tokens of a step stay as many, in fewer rows. The devices
that a short ring leaves share the rows. Expect some three minutes on two CPU cores, and a validation loss near 2.3 nats
a byte.
"""

from dataclasses import replace

from quickstart import config as quickstart

from ringattn.config import Stage

config = replace(
    quickstart,
    name="staged",
    stages=(
        Stage(steps=200, seq_len=1024, batch_size=4, data=4, context=2),
        Stage(steps=100, seq_len=2048, batch_size=2, data=2, context=4, rope_theta=30_000.0, learning_rate=1e-3),
        Stage(steps=100, seq_len=4096, batch_size=1, data=1, context=8, rope_theta=100_000.0, learning_rate=1e-3),
    ),
)
