"""FSDP, context and tensor parallelism combined: 2 x 2 x 2 devices for batch, sequence and heads.

    python scripts/train.py --config configs/fsdp_tensor.py

The batch is sharded over 2 devices, the sequence over 2, parameters over these 4, and heads and feed-forward over 2. 13
million parameters, bfloat16 compute, untied output projection, two microbatches per update. CPUs are slow at bfloat16;
use --train.steps 20 for a quick check. On eight accelerators use --mesh.simulate 0.
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
