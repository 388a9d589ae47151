"""The ring as a static SVG picture.

On the left are the devices with their queries, which stay, and the K/V shards, which rotate. On the right is a table of
the K/V shard of each device at each hop, with the keys that its queries have attended to so far.
"""

from itertools import accumulate
from math import asin, cos, degrees, pi, sin

from ringattn.visualize.svg import COLOURS, DEVICE_RADIUS, NOT_ATTENDED, OPENING, check_devices, rect, text
from ringattn.visualize.work import kv_owners, token_owners

# In pixels: length of an arrow, size of a cell, width of the row labels, height above the table.
GAP, CELL, LABEL, TOP = 44.0, (96.0, 54.0), 80.0, 54.0


def draw(devices: int = 4, layout: str = "contiguous") -> str:
    """Returns the picture as SVG with a white background. Raises ValueError for devices or layouts it cannot draw."""
    check_devices(devices)
    sequence = token_owners(devices, layout)
    radius = max(106.0, (2 * DEVICE_RADIUS + GAP) / 2 / sin(pi / devices))
    table_left = 2 * (radius + DEVICE_RADIUS) + 60 + LABEL
    width = table_left + devices * (CELL[0] + 8) + 16
    height = max(TOP + devices * (CELL[1] + 8) + 40, 2 * (radius + DEVICE_RADIUS) + 32)
    elements = [
        OPENING.format(width=width, height=height),
        f"<title>Ring attention on {devices} devices: queries stay, K/V shards rotate</title>",
        f'<rect width="{width:.0f}" height="{height:.0f}" rx="10" fill="#FFFFFF"/>',
        *_ring(devices, DEVICE_RADIUS + radius + 16, height / 2, radius),
        *_table(devices, sequence, table_left),
        "</svg>",
    ]
    return "\n".join(elements) + "\n"


def _ring(devices: int, x: float, y: float, radius: float) -> list[str]:
    """Devices around (x, y), clockwise from the top, and an arrow from each to the next."""
    elements = [text(x, y - 4, "K/V rotate,"), text(x, y + 18, "queries stay")]
    clear = 2 * asin((DEVICE_RADIUS + 15) / 2 / radius)  # angle from a device's centre to the end of an arrow
    for device in range(devices):
        angle, colour = 2 * pi * device / devices - pi / 2, COLOURS[device]
        centre_x, centre_y = x + radius * cos(angle), y + radius * sin(angle)
        begin, end = angle + clear, angle + 2 * pi / devices - clear
        tip_x, tip_y = x + radius * cos(end), y + radius * sin(end)
        elements += [
            f'<path d="M{x + radius * cos(begin):.1f},{y + radius * sin(begin):.1f} '
            f'A{radius:.1f},{radius:.1f} 0 0 1 {tip_x:.1f},{tip_y:.1f}" fill="none" stroke="{colour}" '
            'stroke-width="6"/>',
            f'<path d="M-6,-11 L10,0 L-6,11 Z" fill="{colour}" '
            f'transform="translate({tip_x:.1f} {tip_y:.1f}) rotate({degrees(end) + 90:.1f})"/>',
            f'<circle cx="{centre_x:.1f}" cy="{centre_y:.1f}" r="{DEVICE_RADIUS:.0f}" fill="#F6F8FA" '
            'stroke="#57606A"/>',
            text(centre_x, centre_y - 20, f"device {device}", size=14),
            text(centre_x, centre_y + 1, f"queries {device}", size=14),
            rect(centre_x - 30, centre_y + 9, 60.0, 23.0, colour),
            text(centre_x, centre_y + 26, f"K/V {device}"),
        ]
    return elements


def _table(devices: int, sequence: list[int], left: float) -> list[str]:
    """One row per device and one column per hop: the K/V shard, and a bar of the keys attended so far."""
    width, height = CELL
    elements = [
        text(left + hop * (width + 8) + width / 2, TOP - 14, f"hop {hop}" if hop else "local K/V")
        for hop in range(devices)
    ]
    token_width = (width - 12) / len(sequence)
    for device, owners in enumerate(kv_owners(devices)):
        top = TOP + device * (height + 8)
        elements.append(text(left - LABEL / 2 - 4, top + height / 2 + 5, f"device {device}"))
        for hop, attended in enumerate(accumulate([[owner] for owner in owners])):
            x = left + hop * (width + 8)
            elements += [
                rect(x, top, width, height, "#FFFFFF", ' stroke="#57606A"'),
                rect(x + 6, top + 6, width - 12, 25.0, COLOURS[owners[hop]]),
                text(x + width / 2, top + 24, f"K/V {owners[hop]}"),
            ]
            for position, owner in enumerate(sequence):
                fill = COLOURS[owner] if owner in attended else NOT_ATTENDED
                elements.append(rect(x + 6 + position * token_width, top + 37, token_width, 11.0, fill, ' rx="0"'))
    middle = left + devices * (width + 8) / 2 - 4
    note = "bar: keys of the sequence attended so far"
    return [*elements, text(middle - LABEL / 2, TOP + devices * (height + 8) + 20, note, size=14)]
