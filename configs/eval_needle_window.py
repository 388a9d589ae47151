"""Compares the models `needle` and `needle_window`, including rows of twice the training length.

    python scripts/eval.py --config configs/eval_needle_window.py

Both heat maps are in runs/needle/evaluations/eval_needle_window/comparison/plots/needle.png. The windowed model finds
needles up to 128 tokens back, even in longer rows. The other model fails in rows longer than its training rows.
"""

from dataclasses import replace

from eval_needle import config as eval_needle

config = replace(
    eval_needle,
    name="eval_needle_window",
    runs=("runs/needle", "runs/needle_window"),
    lengths=(128, 256, 512, 1024),
    depths=(0.0, 0.5, 0.75, 0.85, 0.9, 0.95, 1.0),
    longer=True,
)
