"""A plot of video frames and their reconstructions from tokens."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from ringattn.runs.files import write_figure


def plot_frames(original: np.ndarray, reconstructed: np.ndarray, path: Path) -> None:
    """Plots both uint8 arrays [frames, height, width, 3] as rows of a PNG. Writes nothing if `original` is empty."""
    if not len(original):
        return
    height, width = original.shape[1:3]
    figure = Figure(figsize=(2.5 * len(original), 5.5 * height / width + 0.8), layout="constrained")
    figure.suptitle(f"held-out frames at {width} x {height}: original (above), reconstructed from tokens (below)")
    rows = figure.subplots(2, len(original), squeeze=False)
    for axes, frames, label in zip(rows, (original, reconstructed), ("original", "reconstructed"), strict=True):
        for cell, frame in zip(axes, frames, strict=True):
            cell.imshow(frame, interpolation="nearest")
            cell.set(xticks=[], yticks=[])
        axes[0].set_ylabel(label)
    write_figure(path, figure)
