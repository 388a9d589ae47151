"""A bigger model on all three mesh axes: 2 x 2 devices share rows and parameters, 2 share heads and feed-forward.

    python scripts/train.py --config configs/fsdp_tensor.py

13 million parameters in bfloat16 compute, an output projection of its own, every batch in two parts. On processors,
which are slow at bfloat16, --train.steps 20 is enough to see that it works; on eight accelerators --mesh.simulate 0.
"""

from ringattn.config import Checkpoint, Config, Data, Log, Mesh, Model, Optimizer, Train

config = Config(
    name="fsdp_tensor",
    model=Model(layers=8, dim=384, heads=6, kv_heads=2, head_dim=64, feed_forward=1024, tied=False, dtype="bfloat16"),
    data=Data(path="stdlib", seq_len=2048),
    mesh=Mesh(data=2, context=2, tensor=2, simulate=8),
    optimizer=Optimizer(learning_rate=1e-3, warmup_steps=100),
    train=Train(steps=1000, batch_size=4, accumulate=2),
    checkpoint=Checkpoint(every=100, keep=3),
    log=Log(every=5),
)
