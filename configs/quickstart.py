"""A small transformer on real text, by a ring of 8 simulated devices.

python scripts/train.py --config configs/quickstart.py
"""

from ringattn.config import Checkpoint, Config, Data, Evaluate, Mesh, Model, Optimizer, Train

config = Config(
    name="quickstart",
    model=Model(layers=4, dim=128, heads=4, kv_heads=2, head_dim=32, feed_forward=384),
    data=Data(path="stdlib", seq_len=2048),
    mesh=Mesh(data=-1, context=8, simulate=8),
    optimizer=Optimizer(learning_rate=3e-3, warmup_steps=20),
    train=Train(steps=200, batch_size=4),
    evaluate=Evaluate(every=50, batches=4),
    checkpoint=Checkpoint(every=50),
)
