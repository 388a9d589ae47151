"""The figures as text, for terminals."""

from collections.abc import Mapping

from ringattn.units import bytes_in_words
from ringattn.visualize.attention_memory import Curve, growth
from ringattn.visualize.work import Row, compute_time, imbalance, kv_owners, pairs_per_hop, sent_hops, token_owners


def schedule_text(devices: int, layout: str = "contiguous") -> str:
    """One line per device and one column per hop: owner of the K/V shard, and the keys attended so far (#)."""
    sequence, schedule = token_owners(devices, layout), kv_owners(devices)
    width = len(f"K/V {devices - 1} ") + len(sequence) + 2
    lines = [" " * 10 + "".join(f"hop {hop}".ljust(width) for hop in range(devices))]
    for device, owners in enumerate(schedule):
        cells = []
        for hop, owner in enumerate(owners):
            bar = "".join("#" if token_owner in owners[: hop + 1] else "." for token_owner in sequence)
            cells.append(f"K/V {owner} {bar}".ljust(width))
        lines.append(f"device {device}".ljust(10) + "".join(cells))
    lines.append("#: keys of the sequence that the device's queries have attended to; hop 0: local K/V")
    return "\n".join(line.rstrip() for line in lines)


def balance_text(row: Row) -> str:
    """One line per device and one column per hop: computed pairs in percent of all pairs; - for a hop not sent."""
    sent, work = (0, *sent_hops(row)), pairs_per_hop(row) / row.local**2
    time, balanced_time = compute_time(row)
    lines = [f"{row.layout}, {row.length:,} tokens on {row.shards} devices: computed pairs per hop, % of a full hop"]
    lines.append(" " * 10 + "".join(f"hop {hop}".rjust(8) for hop in range(row.shards)))
    for device, hops in enumerate(work):
        cells = (f"{share:.1%}" if hop in sent else "-" for hop, share in enumerate(hops))
        lines.append(f"device {device}".ljust(10) + "".join(cell.rjust(8) for cell in cells))
    lines.append(f"max/mean {imbalance(row):.2f}: takes {time:.2f} full hops, {balanced_time:.2f} if balanced")
    return "\n".join(lines)


def memory_text(curves: Mapping[str, Curve], unit: str = "tokens") -> str:
    """One line per number of tokens (or of `unit`) and one column per curve: bytes. The last line is `growth`."""
    rows = [(unit, list(curves))]
    for x in sorted({x for curve in curves.values() for x in curve}):
        rows.append((f"{x:,}", [bytes_in_words(curve[x]) if x in curve else "" for curve in curves.values()]))
    rows.append(("per doubling", [f"x {growth(curve):.2f}" if len(curve) > 1 else "-" for curve in curves.values()]))
    width = max(15, *(len(name) + 3 for name in curves))
    lines = [head.rjust(12) + "".join(cell.rjust(width) for cell in cells) for head, cells in rows]
    return "\n".join(["temporary memory per device", *(line.rstrip() for line in lines)])
