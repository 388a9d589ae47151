"""python -m ringattn.visualize [FILE.svg] [--devices 4] [--layout contiguous] [--animate]: draws or prints the ring.

Without a file it prints the K/V shard of each device at each hop, and the balance of causal work. With --memory it
prints the memory of attention per device, after half a minute of compilation.
"""

import argparse
from pathlib import Path

from ringattn.config import Mesh
from ringattn.layout import LAYOUTS
from ringattn.mesh.devices import start
from ringattn.visualize import COLOURS, Row, animate, balance_text, draw, memory_curves, memory_text, schedule_text

BALANCE_TOKENS = 64
"""Tokens per device of the printed balance."""
MEMORY_TOKENS = 512, 4096, 131_072
"""Tokens per device of the printed memory."""


def main() -> None:
    description = "Draws the ring as SVG, or prints its schedule and balance."
    parser = argparse.ArgumentParser(allow_abbrev=False, prog="python -m ringattn.visualize", description=description)
    parser.add_argument("file", type=Path, nargs="?", help="SVG file to write; without it, print text")
    parser.add_argument(
        "--devices", type=int, default=4, choices=range(3, len(COLOURS) + 1), help="devices of the ring (default 4)"
    )
    parser.add_argument(
        "--layout", default="contiguous", choices=LAYOUTS, help="order of the tokens (default contiguous)"
    )
    parser.add_argument("--animate", action="store_true", help="write an animated SVG, hop by hop")
    parser.add_argument("--memory", action="store_true", help="print the compiler's memory per device")
    args = parser.parse_args()
    if args.memory:
        if args.file is not None or args.animate:
            parser.error("--memory prints text; omit the file and --animate")
        start(Mesh(simulate=args.devices))
        lengths = [args.devices * tokens for tokens in MEMORY_TOKENS]
        print(memory_text(memory_curves(lengths, args.devices, args.layout)))
        return
    if args.file is None:
        if args.animate:
            parser.error("--animate needs a file to write, such as ring.svg")
        row = Row(BALANCE_TOKENS * args.devices, args.devices, args.layout)
        print(schedule_text(args.devices, args.layout), balance_text(row), sep="\n\n")
        return
    picture = (animate if args.animate else draw)(args.devices, args.layout)
    args.file.parent.mkdir(parents=True, exist_ok=True)
    args.file.write_text(picture, encoding="utf-8")


if __name__ == "__main__":
    main()
