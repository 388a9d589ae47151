"""The needle model beside the one that sees 64 tokens back, also on rows twice as long as they were trained on.

    python scripts/eval.py --config configs/eval_needle_window.py

The heat maps lie side by side in runs/needle/evaluations/eval_needle_window/comparison/plots/needle.png: the one
shows where sight ends, 128 tokens back, in longer rows, too; the other knows no rows longer than it was trained on.
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
