"""python -m ringattn.visualize [FILE.svg] [--devices 4] [--layout contiguous] [--animate]: the ring, drawn or written.

Without a file it prints who holds which shard at which hop, and how even causal work is.
"""

import argparse
from pathlib import Path

from ringattn.layout import LAYOUTS
from ringattn.visualize import COLOURS, Row, animate, balance_text, draw, schedule_text

TOKENS = 64
"""Of a device, for the printed work."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m ringattn.visualize", description="Draws the ring, or prints it.")
    parser.add_argument("file", type=Path, nargs="?", help="the SVG to write; without it, text")
    parser.add_argument("--devices", type=int, default=4, choices=range(3, len(COLOURS) + 1))
    parser.add_argument("--layout", default="contiguous", choices=LAYOUTS)
    parser.add_argument("--animate", action="store_true", help="a picture that moves, hop by hop")
    asked = parser.parse_args()
    if asked.file is None:
        if asked.animate:
            parser.error("--animate needs a file to write, such as ring.svg")
        row = Row(TOKENS * asked.devices, asked.devices, asked.layout)
        print(schedule_text(asked.devices, asked.layout), balance_text(row), sep="\n\n")
        return
    picture = (animate if asked.animate else draw)(asked.devices, asked.layout)
    asked.file.parent.mkdir(parents=True, exist_ok=True)
    asked.file.write_text(picture, encoding="utf-8")


if __name__ == "__main__":
    main()
