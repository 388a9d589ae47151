"""The needle model with its attention cut to a window of 64 tokens: it cannot find what lies further back.

    python scripts/train.py --config configs/needle_window.py
    python scripts/eval.py --config configs/eval_needle_window.py

Two layers reach back 128 tokens. A mask that is wrong for whatever reason would show in the heat map as this one does.
"""

from dataclasses import replace

from needle import config as needle

config = replace(needle, name="needle_window", attention=replace(needle.attention, window=64))
