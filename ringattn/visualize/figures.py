"""What is seen and how much work it is, as matplotlib figures: masks over shards, and work by device and hop."""

from collections.abc import Mapping

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from ringattn.visualize.svg import COLOURS
from ringattn.visualize.work import Row, full_hops, hops_made, imbalance, pairs, seen

DPI = 80
INK = "#1F2328"


def mask_figure(rows: Mapping[str, Row]) -> Figure:
    """A picture of L x L a row: which keys (across) each query (down) sees, as the tokens lie on the ring.

    A pair that is seen has the colour of the device that the key comes from; lines are the borders of shards.
    """
    figure = Figure(figsize=(3.3 * len(rows) + 0.3, 3.9), layout="constrained", dpi=DPI)
    for axes, (title, row) in zip(figure.subplots(1, len(rows), squeeze=False)[0], rows.items(), strict=True):
        _mask(axes, row)
        axes.set_title(f"{title}\n{seen(row).mean():.1%} of {row.length} x {row.length} pairs seen", fontsize=10)
    return figure


def _mask(axes: Axes, row: Row) -> None:
    homes = np.arange(row.length) // row.local
    colours = np.array([to_rgb(COLOURS[home % len(COLOURS)]) for home in homes])
    axes.imshow(np.where(seen(row)[..., None], colours[None], 1.0), interpolation="nearest")
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
    """A map of devices x hops a row: the pairs a device computes, of those of a hop in which everything is seen.

    An empty cell has nothing to do; hatched hops are not made. The title says max/mean of work at a hop, and the time
    of the ring in full hops.
    """
    most = max(row.shards for row in rows.values())
    size = (1.1 + 0.36 * most) * len(rows) + 0.9, 1.3 + 0.3 * most
    figure = Figure(figsize=size, layout="constrained", dpi=DPI)
    panels, image = figure.subplots(1, len(rows), squeeze=False)[0], None
    for axes, (title, row) in zip(panels, rows.items(), strict=True):
        image = _balance(axes, row)
        time, mean = full_hops(row)
        figures = f"max/mean {imbalance(row):.2f}; time {time:.2f} hops, even {mean:.2f}"
        axes.set_title(f"{title}\n{figures}", fontsize=10)
    assert image is not None
    figure.colorbar(image, ax=list(panels), label="work, % of a full hop")
    return figure


def _balance(axes: Axes, row: Row):
    work, made = 100 * pairs(row) / row.local**2, (0, *hops_made(row))
    image = axes.imshow(work, vmin=0, vmax=100, cmap=colormaps["YlGnBu"].resampled(20), aspect="auto")
    for (device, hop), share in np.ndenumerate(work):
        if share > 0:
            colour = "white" if share > 55 else INK
            axes.text(hop, device, f"{share:.0f}", ha="center", va="center", fontsize=8, color=colour)
    for hop in set(range(row.shards)) - set(made):
        axes.axvspan(hop - 0.5, hop + 0.5, facecolor="#F6F8FA", edgecolor="#8C959F", hatch="////", linewidth=0)
    axes.set_xticks(range(row.shards))
    axes.set_yticks(range(row.shards))
    axes.tick_params(length=0)
    axes.set(xlabel="hop (0: the device's own keys)", ylabel="device")
    return image
