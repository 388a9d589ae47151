"""The ring as a picture: SVG, as in the README.

Left the devices, each with the queries that stay and the keys and values that go round; right who holds which shard
at which hop, and which part of the sequence its queries have seen by then. It is all computed, nothing is painted.
"""

from itertools import accumulate
from math import asin, cos, degrees, pi, sin

from ringattn.visualize.svg import COLOURS, DEVICE, OPENING, UNSEEN, check_devices, rect, text
from ringattn.visualize.work import owners, visitors

# In pixels: an arrow's length, a cell, the rows' labels, what lies above the rows.
GAP, CELL, LABEL, TOP = 44.0, (96.0, 54.0), 80.0, 54.0


def draw(devices: int = 4, layout: str = "contiguous") -> str:
    """The picture as SVG, on a background of its own. Raises ValueError for a ring or a layout it cannot draw."""
    check_devices(devices)
    sequence = owners(devices, layout)
    radius = max(106.0, (2 * DEVICE + GAP) / 2 / sin(pi / devices))
    grid = 2 * (radius + DEVICE) + 60 + LABEL
    width = grid + devices * (CELL[0] + 8) + 16
    height = max(TOP + devices * (CELL[1] + 8) + 40, 2 * (radius + DEVICE) + 32)
    parts = [
        OPENING.format(width=width, height=height),
        f"<title>Ring attention on {devices} devices: queries stay, keys and values go round</title>",
        f'<rect width="{width:.0f}" height="{height:.0f}" rx="10" fill="#FFFFFF"/>',
        *_ring(devices, DEVICE + radius + 16, height / 2, radius),
        *_schedule(devices, sequence, grid),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _ring(devices: int, x: float, y: float, radius: float) -> list[str]:
    """The devices around (x, y), clockwise from the top, and what each sends to the next."""
    parts = [text(x, y - 4, "K/V go round,"), text(x, y + 18, "queries stay")]
    clear = 2 * asin((DEVICE + 15) / 2 / radius)  # the angle that a device takes, with some air
    for device in range(devices):
        angle, colour = 2 * pi * device / devices - pi / 2, COLOURS[device]
        here_x, here_y = x + radius * cos(angle), y + radius * sin(angle)
        begin, end = angle + clear, angle + 2 * pi / devices - clear
        tip_x, tip_y = x + radius * cos(end), y + radius * sin(end)
        parts += [
            f'<path d="M{x + radius * cos(begin):.1f},{y + radius * sin(begin):.1f} '
            f'A{radius:.1f},{radius:.1f} 0 0 1 {tip_x:.1f},{tip_y:.1f}" fill="none" stroke="{colour}" '
            'stroke-width="6"/>',
            f'<path d="M-6,-11 L10,0 L-6,11 Z" fill="{colour}" '
            f'transform="translate({tip_x:.1f} {tip_y:.1f}) rotate({degrees(end) + 90:.1f})"/>',
            f'<circle cx="{here_x:.1f}" cy="{here_y:.1f}" r="{DEVICE:.0f}" fill="#F6F8FA" stroke="#57606A"/>',
            text(here_x, here_y - 20, f"device {device}", size=14),
            text(here_x, here_y + 1, f"queries {device}", size=14),
            rect(here_x - 30, here_y + 9, 60.0, 23.0, colour),
            text(here_x, here_y + 26, f"K/V {device}"),
        ]
    return parts


def _schedule(devices: int, sequence: list[int], left: float) -> list[str]:
    """A row a device, a column a hop: the shard that is there, and the sequence as far as it has been seen."""
    width, high = CELL
    parts = [
        text(left + hop * (width + 8) + width / 2, TOP - 14, f"hop {hop}" if hop else "at home")
        for hop in range(devices)
    ]
    slot = (width - 12) / len(sequence)
    for device, row in enumerate(visitors(devices)):
        top = TOP + device * (high + 8)
        parts.append(text(left - LABEL / 2 - 4, top + high / 2 + 5, f"device {device}"))
        for hop, seen in enumerate(accumulate([[home] for home in row])):
            x = left + hop * (width + 8)
            parts += [
                rect(x, top, width, high, "#FFFFFF", ' stroke="#57606A"'),
                rect(x + 6, top + 6, width - 12, 25.0, COLOURS[row[hop]]),
                text(x + width / 2, top + 24, f"K/V {row[hop]}"),
            ]
            for place, owner in enumerate(sequence):
                fill = COLOURS[owner] if owner in seen else UNSEEN
                parts.append(rect(x + 6 + place * slot, top + 37, slot, 11.0, fill, ' rx="0"'))
    middle = left + devices * (width + 8) / 2 - 4
    note = "the bar: which keys of the sequence its queries have seen"
    return [*parts, text(middle - LABEL / 2, TOP + devices * (high + 8) + 20, note, size=14)]
