"""The quickstart, logged to TensorBoard and Weights & Biases.

    python scripts/train.py --config configs/tracked.py

Requires `pip install -e '.[tensorboard,wandb]'`. To view the run: `pip install tensorboard`, then `tensorboard --logdir
runs`. Nothing is sent to Weights & Biases unless you run `wandb login` and set WANDB_MODE=online, or later run `wandb
sync runs/tracked/wandb/offline-run-*`. Expect the losses of the quickstart.
"""

from dataclasses import replace

from quickstart import config as quickstart

config = replace(
    quickstart,
    name="tracked",
    log=replace(quickstart.log, tensorboard=True, wandb=True),
)
