"""The ring as an animated SVG picture (SMIL, without a script).

A hop takes `HOP_SECONDS`. While a device computes with a K/V shard, a copy already travels to the next device and
arrives before the compute ends: this is how the ring overlaps transfers with compute. One bar per device grows with the
keys that its queries have attended to. A viewer without SMIL shows the ring before the first hop.
"""

from collections.abc import Sequence
from itertools import groupby
from math import cos, pi, sin

from ringattn.visualize.svg import COLOURS, DEVICE_RADIUS, NOT_ATTENDED, OPENING, check_devices, rect, text
from ringattn.visualize.work import kv_owners, token_owners

HOP_SECONDS, PAUSE_SECONDS = 2.4, 1.6
"""Compute of one hop, and the pause at the end of the loop."""
TRAVEL = 0.8
"""Fraction of a hop's compute that its transfer takes."""
GAP, SHARD, BAR, ROW_HEIGHT = 110.0, (60.0, 23.0), 240.0, 44.0
"""In pixels: gap between two devices, size of a K/V shard, length of a bar, height of a row of bars."""

Points = Sequence[tuple[float, float]]


def animate(devices: int = 4, layout: str = "contiguous") -> str:
    """Returns the animation as SVG, in a loop. Raises ValueError for devices or layouts it cannot draw."""
    check_devices(devices)
    sequence = token_owners(devices, layout)
    radius = max(150.0, (2 * DEVICE_RADIUS + GAP) / 2 / sin(pi / devices))
    x, y = radius + DEVICE_RADIUS + 16, radius + DEVICE_RADIUS + 16
    centres = [
        (x + radius * cos(angle), y + radius * sin(angle))
        for angle in (2 * pi * device / devices - pi / 2 for device in range(devices))
    ]
    left = 2 * (radius + DEVICE_RADIUS) + 20
    width, height = left + BAR + 110, max(2 * (radius + DEVICE_RADIUS) + 32, devices * ROW_HEIGHT + 120)
    elements = [
        OPENING.format(width=width, height=height),
        f"<title>Ring attention on {devices} devices, hop by hop: queries stay, K/V shards rotate</title>",
        f'<rect width="{width:.0f}" height="{height:.0f}" rx="10" fill="#FFFFFF"/>',
        *_copies_in_transit(devices, radius, centres),
        *_devices(devices, centres),
        *_captions(devices, x, y),
        *_bars(devices, sequence, left, height / 2),
        "</svg>",
    ]
    return "\n".join(elements) + "\n"


def _animation(
    attribute: str, devices: int, moments: Sequence[tuple[float, str]], mode: str, tag: str = "animate"
) -> str:
    """The opening of an endless animation, without its closing `/>`. `moments` are (time in hops, value)."""
    total = _loop_seconds(devices)
    times = ";".join(f"{min(HOP_SECONDS * at / total, 1):.4g}" for at, _ in moments)
    values = ";".join(value for _, value in moments)
    name = f' attributeName="{attribute}"' if attribute else ""
    kind = ' type="translate"' if tag == "animateTransform" else ""
    changed = "keyPoints" if tag == "animateMotion" else "values"
    return (
        f'<{tag}{name}{kind} {changed}="{values}" keyTimes="{times}" calcMode="{mode}" dur="{total:.1f}s" '
        'repeatCount="indefinite"'
    )


def _loop_seconds(devices: int) -> float:
    return HOP_SECONDS * devices + PAUSE_SECONDS


def _shard(owner: int) -> str:
    width, height = SHARD
    return rect(-width / 2, -height / 2, width, height, COLOURS[owner], ' rx="4" stroke="#57606A"') + text(
        0.0, 5.5, f"K/V {owner}"
    )


def _copies_in_transit(devices: int, radius: float, centres: Points) -> list[str]:
    """K/V copies that travel along the ring, visible between two devices and hidden behind the circles of both."""
    x, y = (sum(coordinates) / devices for coordinates in zip(*centres, strict=True))
    elements = [
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}" fill="none" stroke="#D0D7DE" stroke-width="3" '
        'stroke-dasharray="2 7" stroke-linecap="round"/>'
    ]
    end = _loop_seconds(devices) / HOP_SECONDS
    for owner in range(devices):
        # Relative to the owner's centre, where the copy stays in a viewer without SMIL.
        x, y = centres[owner]
        stops = [centres[(owner + hop) % devices] for hop in range(1, devices)]
        path = "M0,0" + "".join(
            f"A{radius:.1f},{radius:.1f} 0 0 1 {to_x - x:.1f},{to_y - y:.1f}" for to_x, to_y in stops
        )
        moments = [(0.0, "0")]
        for hop in range(1, devices):
            fraction = f"{hop / (devices - 1):.4g}"
            moments += [(hop - 1 + TRAVEL, fraction), (float(hop), fraction)]
        moments.append((end, "1"))
        motion = _animation("", devices, moments, "linear", "animateMotion")
        elements.append(f'<g transform="translate({x:.1f} {y:.1f})"><g>{_shard(owner)}{motion} path="{path}"/></g></g>')
    return elements


def _devices(devices: int, centres: Points) -> list[str]:
    """Devices with their queries and the K/V shards that they compute with, which change at every hop."""
    elements = []
    for device, (x, y) in enumerate(centres):
        elements += [
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{DEVICE_RADIUS:.0f}" fill="#F6F8FA" stroke="#57606A"/>',
            text(x, y - 20, f"device {device}", size=14),
            text(x, y + 1, f"queries {device}", size=14),
        ]
    owners = kv_owners(devices)
    for owner in range(devices):
        stops = [next(device for device in range(devices) if owners[device][hop] == owner) for hop in range(devices)]
        values = [f"{centres[stop][0]:.1f} {centres[stop][1] + 20.5:.1f}" for stop in stops]
        moments = [(float(hop), value) for hop, value in enumerate(values)]
        jumps = _animation("transform", devices, moments, "discrete", "animateTransform")
        elements.append(f'<g transform="translate({values[0]})">{_shard(owner)}{jumps}/></g>')
    return elements


def _captions(devices: int, x: float, y: float) -> list[str]:
    """The current hop and what the devices do, in the middle of the ring."""
    captions = [("local K/V", "each device computes", "and sends a copy on")]
    captions += [
        (f"hop {hop} of {devices - 1}", "each device computes", "and sends a copy on") for hop in range(1, devices)
    ]
    captions[-1] = (captions[-1][0], "each device computes,", "nothing more is sent")
    captions.append(("done", "every query has", "attended to every key"))
    elements = []
    for number, (title, *lines) in enumerate(captions):
        moments = [(0.0, "1" if number == 0 else "0")]
        if number:
            moments.append((float(number), "1"))
        if number < devices:
            moments.append((float(number + 1), "0"))
        opacity = _animation("opacity", devices, moments, "discrete")
        body = text(x, y - 24, title, size=18) + "".join(
            text(x, y + 20 * row, line, size=14) for row, line in enumerate(lines)
        )
        elements.append(f'<g opacity="{1 if number == 0 else 0}">{body}{opacity}/></g>')
    return elements


def _bars(devices: int, sequence: Sequence[int], left: float, middle: float) -> list[str]:
    """One bar per device; the keys of a K/V shard fill while the device computes with it."""
    token_width, top = BAR / len(sequence), middle - devices * ROW_HEIGHT / 2
    elements = [text(left + 85 + BAR / 2, top - 12, "keys attended so far", size=14)]
    end = _loop_seconds(devices) / HOP_SECONDS
    for device, owners in enumerate(kv_owners(devices)):
        y = top + device * ROW_HEIGHT
        elements.append(text(left + 40, y + 21, f"device {device}", size=14))
        elements.append(rect(left + 85, y + 6, BAR, 20.0, NOT_ATTENDED, ""))
        position = 0
        for owner, tokens in groupby(sequence):  # adjacent tokens of one owner share a stripe
            hop, count = float(owners.index(owner)), len(list(tokens))
            full = f"{count * token_width:.1f}"
            moments = [(hop, "0"), (hop + 1, full), (end, full)]
            if hop > 0:
                moments.insert(0, (0.0, "0"))
            grows = _animation("width", devices, moments, "linear")
            stripe = rect(left + 85 + position * token_width, y + 6, 0.0, 20.0, COLOURS[owner], "")
            elements.append(f"{stripe[:-2]}>{grows}/></rect>")
            position += count
    return elements
