"""The needle model with a sliding window of 64 preceding tokens, so that needles further back are not visible.

    python scripts/train.py --config configs/needle_window.py
    python scripts/eval.py --config configs/eval_needle_window.py

Two layers together reach back 128 tokens. The heat map would also show an error in the mask.
"""

from dataclasses import replace

from needle import config as needle

config = replace(needle, name="needle_window", model=replace(needle.model, window=64))
