"""The ring in motion: SVG that animates itself (SMIL), without a script.

A hop takes `STEP` seconds. While a device computes with the K/V shard in its hands, a copy is already on its way to the
next device, and arrives before the work is done: that is how a ring hides its transfers. Beside it a bar a device
grows, of the keys of the sequence that its queries have seen. Where nothing moves (a viewer without SMIL) it shows the
ring at home.
"""

from collections.abc import Sequence
from itertools import groupby
from math import cos, pi, sin

from ringattn.visualize.svg import COLOURS, DEVICE, OPENING, UNSEEN, check_devices, rect, text
from ringattn.visualize.work import owners, visitors

STEP, TRAVEL, PAUSE = 2.4, 0.8, 1.6
"""Seconds of a hop's work, the share of it that the transfer takes, seconds at the end before it starts again."""
GAP, SLOT, BAR, ROW = 110.0, (60.0, 23.0), 240.0, 44.0
"""In pixels: free way between two devices, a K/V shard, a bar's length, a row of bars."""


def animate(devices: int = 4, layout: str = "contiguous") -> str:
    """The moving picture as SVG, in a loop. Raises ValueError for a ring or a layout it cannot draw."""
    check_devices(devices)
    sequence = owners(devices, layout)
    radius = max(150.0, (2 * DEVICE + GAP) / 2 / sin(pi / devices))
    x, y = radius + DEVICE + 16, radius + DEVICE + 16
    places = [
        (x + radius * cos(angle), y + radius * sin(angle))
        for angle in (2 * pi * device / devices - pi / 2 for device in range(devices))
    ]
    left = 2 * (radius + DEVICE) + 20
    width, height = left + BAR + 110, max(2 * (radius + DEVICE) + 32, devices * ROW + 120)
    parts = [
        OPENING.format(width=width, height=height),
        f"<title>Ring attention on {devices} devices, hop by hop: queries stay, keys and values go round</title>",
        f'<rect width="{width:.0f}" height="{height:.0f}" rx="10" fill="#FFFFFF"/>',
        *_travellers(devices, radius, places),
        *_devices(devices, places),
        *_captions(devices, x, y),
        *_bars(devices, sequence, left, height / 2),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _timed(attribute: str, devices: int, moments: Sequence[tuple[float, str]], mode: str, tag: str = "animate") -> str:
    """An attribute's values from moments on, in steps' time, once a turn of the loop, for ever."""
    total = _total(devices)
    times = ";".join(f"{min(STEP * at / total, 1):.4g}" for at, _ in moments)
    values = ";".join(value for _, value in moments)
    name = f' attributeName="{attribute}"' if attribute else ""
    kind = ' type="translate"' if tag == "animateTransform" else ""
    changed = "keyPoints" if tag == "animateMotion" else "values"
    return (
        f'<{tag}{name}{kind} {changed}="{values}" keyTimes="{times}" calcMode="{mode}" dur="{total:.1f}s" '
        'repeatCount="indefinite"'
    )


def _total(devices: int) -> float:
    return STEP * devices + PAUSE


def _shard(number: int) -> str:
    width, high = SLOT
    return rect(-width / 2, -high / 2, width, high, COLOURS[number], ' rx="4" stroke="#57606A"') + text(
        0.0, 5.5, f"K/V {number}"
    )


def _travellers(devices: int, radius: float, places: Sequence[tuple[float, float]]) -> list[str]:
    """The copies that are under way: seen between two devices, hidden behind them where they leave and arrive."""
    parts = []
    x, y = (sum(place) / devices for place in zip(*places, strict=True))
    parts.append(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}" fill="none" stroke="#D0D7DE" stroke-width="3" '
        'stroke-dasharray="2 7" stroke-linecap="round"/>'
    )
    end = _total(devices) / STEP
    for home in range(devices):
        # Relative to home, where the copy stays if nothing moves.
        x, y = places[home]
        stops = [places[(home + hop) % devices] for hop in range(1, devices)]
        path = "M0,0" + "".join(
            f"A{radius:.1f},{radius:.1f} 0 0 1 {to_x - x:.1f},{to_y - y:.1f}" for to_x, to_y in stops
        )
        moments = [(0.0, "0")]
        for hop in range(1, devices):
            point = f"{hop / (devices - 1):.4g}"
            moments += [(hop - 1 + TRAVEL, point), (float(hop), point)]
        moments.append((end, "1"))
        motion = _timed("", devices, moments, "linear", "animateMotion")
        parts.append(f'<g transform="translate({x:.1f} {y:.1f})"><g>{_shard(home)}{motion} path="{path}"/></g></g>')
    return parts


def _devices(devices: int, places: Sequence[tuple[float, float]]) -> list[str]:
    """Each device with its queries, and the K/V shards that are at work, which change hands from hop to hop."""
    parts = []
    for device, (x, y) in enumerate(places):
        parts += [
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{DEVICE:.0f}" fill="#F6F8FA" stroke="#57606A"/>',
            text(x, y - 20, f"device {device}", size=14),
            text(x, y + 1, f"queries {device}", size=14),
        ]
    at = visitors(devices)
    for home in range(devices):
        stops = [next(device for device in range(devices) if at[device][hop] == home) for hop in range(devices)]
        values = [f"{places[stop][0]:.1f} {places[stop][1] + 20.5:.1f}" for stop in stops]
        jumps = _timed(
            "transform",
            devices,
            [(float(hop), value) for hop, value in enumerate(values)],
            "discrete",
            "animateTransform",
        )
        parts.append(f'<g transform="translate({values[0]})">{_shard(home)}{jumps}/></g>')
    return parts


def _captions(devices: int, x: float, y: float) -> list[str]:
    """In the middle of the ring: which hop it is, and at its end why that was exact."""
    words = [("at home", "own K/V at work,", "copies on their way")]
    words += [(f"hop {hop} of {devices - 1}", "visitors at work,", "copies on their way") for hop in range(1, devices)]
    words[-1] = (words[-1][0], "visitors at work,", "the last ones")
    words.append(("done", "every query has", "seen every key"))
    parts = []
    for number, (title, *rest) in enumerate(words):
        moments = [(0.0, "1" if number == 0 else "0")]
        if number:
            moments.append((float(number), "1"))
        if number < devices:
            moments.append((float(number + 1), "0"))
        shown = _timed("opacity", devices, moments, "discrete")
        body = text(x, y - 24, title, size=18) + "".join(
            text(x, y + 20 * line, each, size=14) for line, each in enumerate(rest)
        )
        parts.append(f'<g opacity="{1 if number == 0 else 0}">{body}{shown}/></g>')
    return parts


def _bars(devices: int, sequence: Sequence[int], left: float, middle: float) -> list[str]:
    """A bar a device, in which the keys of a visiting shard fill up while they are at work."""
    slot, top = BAR / len(sequence), middle - devices * ROW / 2
    parts = [text(left + 85 + BAR / 2, top - 12, "keys that its queries have seen", size=14)]
    end = _total(devices) / STEP
    for device, row in enumerate(visitors(devices)):
        y = top + device * ROW
        parts.append(text(left + 40, y + 21, f"device {device}", size=14))
        parts.append(rect(left + 85, y + 6, BAR, 20.0, UNSEEN, ""))
        place = 0
        for owner, tokens in groupby(sequence):  # neighbours of one owner are one stripe
            hop, count = float(row.index(owner)), len(list(tokens))
            moments = [(hop, "0"), (hop + 1, f"{count * slot:.1f}"), (end, f"{count * slot:.1f}")]
            grows = _timed("width", devices, [(0.0, "0")][: int(hop > 0)] + moments, "linear")
            shape = rect(left + 85 + place * slot, y + 6, 0.0, 20.0, COLOURS[owner], "")
            parts.append(f"{shape[:-2]}>{grows}/></rect>")
            place += count
    return parts
