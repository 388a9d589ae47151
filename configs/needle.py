"""A tiny model, trained from scratch to find a needle at every depth of rows of 512 bytes.

    python scripts/train.py --config configs/needle.py
    python scripts/eval.py --config configs/eval_needle.py

Each document is prose with a hidden seven-digit number, followed by a question about the number; all but the answer is
masked out of the loss. The model first learns documents of 128 and 256 bytes, packed into rows, which speeds up
learning those of 512. Expect about twelve minutes on two CPU cores.
"""

from ringattn.config import Attention, Checkpoint, Config, Data, Log, Mesh, Model, Optimizer, Train, Validation

config = Config(
    name="needle",
    model=Model(layers=2, dim=128, heads=8, kv_heads=8, head_dim=16, feed_forward=128, rope_theta=1e6),
    data=Data(path=("task:needle:128", "task:needle:256", "task:needle:512"), mixture=(2, 1, 1), seq_len=512),
    mesh=Mesh(data=2, context=4, simulate=8),
    attention=Attention(layout="zigzag", strategy="ring"),
    optimizer=Optimizer(learning_rate=1e-3, warmup_steps=50),
    train=Train(steps=1500, batch_size=16),
    validation=Validation(every=100, batches=4),
    checkpoint=Checkpoint(every=200),
    log=Log(every=25),
)
