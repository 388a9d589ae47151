"""python -m ringattn.visualize [FILE.svg] [--devices 4] [--layout contiguous] [--animate]: the ring, drawn or written.

Without a file it prints who holds which shard at which hop, and how even causal work is; with --memory what attention
takes of a device, for which half a minute is spent on compiling.
"""

import argparse
from pathlib import Path

from ringattn.config import Mesh
from ringattn.layout import LAYOUTS
from ringattn.mesh import start
from ringattn.visualize import COLOURS, Row, animate, balance_text, draw, memory_curves, memory_text, schedule_text

TOKENS = 64
"""Of a device, for the printed work."""
SHARDS = 512, 4096, 131_072
"""Tokens of a device, for the printed memory."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m ringattn.visualize", description="Draws the ring, or prints it.")
    parser.add_argument("file", type=Path, nargs="?", help="the SVG to write; without it, text")
    parser.add_argument("--devices", type=int, default=4, choices=range(3, len(COLOURS) + 1))
    parser.add_argument("--layout", default="contiguous", choices=LAYOUTS)
    parser.add_argument("--animate", action="store_true", help="a picture that moves, hop by hop")
    parser.add_argument("--memory", action="store_true", help="print what the compiler plans of a device's memory")
    asked = parser.parse_args()
    if asked.memory:
        if asked.file is not None or asked.animate:
            parser.error("--memory prints: give no file, and not --animate")
        start(Mesh(simulate=asked.devices))
        print(memory_text(memory_curves([asked.devices * each for each in SHARDS], asked.devices, asked.layout)))
        return
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
