"""The pictures as text, for terminals."""

from collections.abc import Mapping

from ringattn.units import bytes_in_words
from ringattn.visualize.memory import Curve, doubling
from ringattn.visualize.work import Row, full_hops, hops_made, imbalance, owners, pairs, visitors


def schedule_text(devices: int, layout: str = "contiguous") -> str:
    """A line a device, a column a hop: whose K/V are there, and a bar of the sequence: # seen by then, . not yet."""
    sequence, columns = owners(devices, layout), visitors(devices)
    cell = max(len(f"K/V {devices - 1} "), len("at home ")) + len(sequence) + 2
    heads = ["at home", *(f"hop {hop}" for hop in range(1, devices))]
    lines = [" " * 10 + "".join(head.ljust(cell) for head in heads)]
    for device, row in enumerate(columns):
        cells = []
        for hop, home in enumerate(row):
            bar = "".join("#" if owner in row[: hop + 1] else "." for owner in sequence)
            cells.append(f"K/V {home} {bar}".ljust(cell))
        lines.append(f"device {device}".ljust(10) + "".join(cells))
    lines.append("the bar: which keys of the sequence the device's queries have seen")
    return "\n".join(line.rstrip() for line in lines)


def balance_text(row: Row) -> str:
    """A line a device, a column a hop: work in percent of a hop in which every query sees every key; - if not sent."""
    made, work = (0, *hops_made(row)), pairs(row) / row.local**2
    time, mean = full_hops(row)
    lines = [f"{row.layout}, {row.length:,} tokens on {row.shards} devices: work of a hop, % of all its pairs"]
    lines.append(" " * 10 + "".join(f"hop {hop}".rjust(8) for hop in range(row.shards)))
    for device, hops in enumerate(work):
        cells = (f"{share:.1%}" if hop in made else "-" for hop, share in enumerate(hops))
        lines.append(f"device {device}".ljust(10) + "".join(cell.rjust(8) for cell in cells))
    lines.append(f"max/mean {imbalance(row):.2f}: takes {time:.2f} full hops, {mean:.2f} if work were even")
    return "\n".join(lines)


def memory_text(curves: Mapping[str, Curve], against: str = "tokens") -> str:
    """A line a number of tokens (or devices), a column a curve: bytes; at last `doubling` of each."""
    rows = [(against, list(curves))]
    for x in sorted({x for curve in curves.values() for x in curve}):
        rows.append((f"{x:,}", [bytes_in_words(curve[x]) if x in curve else "" for curve in curves.values()]))
    rows.append(("a doubling", [f"x {doubling(curve):.2f}" if len(curve) > 1 else "-" for curve in curves.values()]))
    width = max(15, *(len(name) + 3 for name in curves))
    lines = [head.rjust(12) + "".join(cell.rjust(width) for cell in cells) for head, cells in rows]
    return "\n".join(["temporary memory of a device", *(line.rstrip() for line in lines)])
