"""The needle model with a sliding window of 64 preceding tokens, which hides needles further back.

    python scripts/train.py --config configs/needle_window.py
    python scripts/eval.py --config configs/eval_needle_window.py

Two layers reach back 128 tokens. The heat map also reveals a wrong mask.
"""

from dataclasses import replace

from needle import config as needle

config = replace(needle, name="needle_window", attention=replace(needle.attention, window=64))
