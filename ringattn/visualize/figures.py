"""Matplotlib figures of masks and of work per device and hop."""

from collections.abc import Mapping

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from ringattn.visualize.svg import COLOURS
from ringattn.visualize.work import Row, compute_time, dense_mask, imbalance, pairs_per_hop, sent_hops

DPI = 160
INK = "#1F2328"


def mask_figure(rows: Mapping[str, Row]) -> Figure:
    """One L x L map per row, with queries down and keys across, in the order in which the ring stores the tokens.

    A visible pair has the colour of the device that owns the key. Lines are the borders of shards.
    """
    figure = Figure(figsize=(3.3 * len(rows) + 0.3, 3.9), layout="constrained", dpi=DPI)
    panels = figure.subplots(1, len(rows), squeeze=False)[0]
    for axes, (title, row) in zip(panels, rows.items(), strict=True):
        _draw_mask(axes, row)
        visible = f"{dense_mask(row).mean():.1%} of {row.length} x {row.length} pairs visible"
        axes.set_title(f"{title}\n{visible}", fontsize=10)
    return figure


def _draw_mask(axes: Axes, row: Row) -> None:
    owners = np.arange(row.length) // row.local
    colours = np.array([to_rgb(COLOURS[owner % len(COLOURS)]) for owner in owners])
    axes.imshow(np.where(dense_mask(row)[..., None], colours[None], 1.0), interpolation="nearest")
    for border in range(1, row.shards):
        for line in (axes.axhline, axes.axvline):
            line(border * row.local - 0.5, color=INK, linewidth=0.8)
    middles = (np.arange(row.shards) + 0.5) * row.local - 0.5
    names = [str(device) for device in range(row.shards)]
    axes.set_xticks(middles, names)
    axes.set_yticks(middles, names)
    axes.tick_params(length=0)
    axes.set(xlabel="keys, by device", ylabel="queries, by device")


def balance_figure(rows: Mapping[str, Row]) -> Figure:
    """One map of devices x hops per row: computed pairs in percent of all pairs of a hop.

    An empty cell computes nothing. Hatched hops are not sent. The title gives max/mean of the work per hop and the
    time of the ring in full hops.
    """
    most = max(row.shards for row in rows.values())
    size = (1.1 + 0.36 * most) * len(rows) + 0.9, 1.3 + 0.3 * most
    figure = Figure(figsize=size, layout="constrained", dpi=DPI)
    panels = figure.subplots(1, len(rows), squeeze=False)[0]
    images = [_draw_balance(axes, row) for axes, row in zip(panels, rows.values(), strict=True)]
    for axes, (title, row) in zip(panels, rows.items(), strict=True):
        time, balanced_time = compute_time(row)
        numbers = f"max/mean {imbalance(row):.2f}; {time:.2f} full hops, {balanced_time:.2f} if balanced"
        axes.set_title(f"{title}\n{numbers}", fontsize=10)
    figure.colorbar(images[0], ax=list(panels), label="computed pairs, % of a full hop")
    return figure


def _draw_balance(axes: Axes, row: Row) -> AxesImage:
    work, sent = 100 * pairs_per_hop(row) / row.local**2, (0, *sent_hops(row))
    image = axes.imshow(work, vmin=0, vmax=100, cmap=colormaps["YlGnBu"].resampled(20), aspect="auto")
    for (device, hop), percent in np.ndenumerate(work):
        if percent > 0:
            colour = "white" if percent > 55 else INK
            axes.text(hop, device, f"{percent:.0f}", ha="center", va="center", fontsize=8, color=colour)
    for hop in set(range(row.shards)) - set(sent):
        axes.axvspan(hop - 0.5, hop + 0.5, facecolor="#F6F8FA", edgecolor="#8C959F", hatch="////", linewidth=0)
    axes.set_xticks(range(row.shards))
    axes.set_yticks(range(row.shards))
    axes.tick_params(length=0)
    axes.set(xlabel="hop (0: local K/V)", ylabel="device")
    return image
