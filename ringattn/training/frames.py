"""A look at what tokens keep of a video: frames as they are beside frames made of their tokens again."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure


def plot_frames(original: np.ndarray, rebuilt: np.ndarray, path: Path) -> None:
    """Draws both, [frames, height, width, 3] uint8, one above the other, as a PNG; of no frames it draws nothing."""
    if not len(original):
        return
    height, width = original.shape[1:3]
    figure = Figure(figsize=(2.5 * len(original), 5.5 * height / width + 0.8), layout="constrained")
    figure.suptitle(f"held-out frames at {width} x {height}: as they are (above), and made of their tokens (below)")
    rows = figure.subplots(2, len(original), squeeze=False)
    for axes, frames, label in zip(rows, (original, rebuilt), ("original", "from tokens"), strict=True):
        for each, frame in zip(axes, frames, strict=True):
            each.imshow(frame, interpolation="nearest")
            each.set(xticks=[], yticks=[])
        axes[0].set_ylabel(label)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=150)
