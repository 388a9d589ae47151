"""Plans an 8B model with the architecture of Llama 3 on rows of 1,048,576 tokens, with one ring over all devices.

    python scripts/plan.py --config configs/llama3_8b_1m.py --topology v5e:8x8

Expect it to fit on 64 chips with 15.75 GiB each. To train it on such devices, use scripts/train.py with the path of
Llama's tokenizer.json as --data.tokenizer.
"""

from ringattn.config import Config, Data, Log, Mesh, Model, Optimizer, Train

config = Config(
    name="llama3_8b_1m",
    model=Model(
        layers=32,
        dim=4096,
        heads=32,
        kv_heads=8,
        head_dim=128,
        feed_forward=14336,
        vocabulary=128_256,
        rope_theta=500_000.0,
        rope_scaling="llama3",
        rope_factor=128.0,
        tied=False,
        dtype="bfloat16",
        remat="on",
    ),
    data=Data(seq_len=1_048_576),
    mesh=Mesh(context=-1),
    optimizer=Optimizer(learning_rate=2e-5, warmup_steps=10),
    train=Train(steps=1000, batch_size=1),
    log=Log(every=1),
)
