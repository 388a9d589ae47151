"""The quickstart, to be watched while it goes on: in TensorBoard, and in Weights & Biases.

    python scripts/train.py --config configs/tracked.py

It needs `pip install -e '.[tensorboard,wandb]'` and, to look at it, `pip install tensorboard` and `tensorboard
--logdir runs`. Weights & Biases is sent nothing unless you say so, by WANDB_MODE=online after `wandb login`, or later
by `wandb sync runs/tracked/wandb/offline-run-*`. Expect the quickstart's losses.
"""

from dataclasses import replace

from quickstart import config as quickstart

config = replace(
    quickstart,
    name="tracked",
    log=replace(quickstart.log, tensorboard=True, wandb=True),
)
