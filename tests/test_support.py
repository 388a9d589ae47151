"""One probe per feature of ringattn, and the support table that compares them with other libraries.

    python tests/test_support.py

runs every probe and writes the table into ringattn/attn/README.md. The cells of other libraries are in support.toml.
"""

import inspect
import re
import tomllib
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from cases import Program, draw_arrays, judge, measure
from test_ring import G, gradient
from test_ring import program as abstract
from wire import permuted

import ringattn
from ringattn import Mask, attention
from ringattn.mesh.topology import arrange_devices

FRONT = Path(__file__).parents[1] / "README.md"
GUIDE = FRONT.parent / "ringattn" / "attn" / "README.md"
OTHERS = tomllib.loads(Path(__file__).with_name("support.toml").read_text(encoding="utf-8"))
TABLE, SOURCES = "<!-- support table: python tests/test_support.py -->", "<!-- sources of the support table -->"
END = "<!-- end -->"
LEGEND = """\
For ringattn, a probe in [tests/test_support.py](../../tests/test_support.py) runs each feature on simulated devices.
*yes*: output and gradients agree with dense attention in float64 (in bfloat16, only the output). *no*: the feature is
refused or does not exist. The last row is from "tested on" in the [README](../../README.md#what-works).

The other columns are based on the source code of the releases in the header, as of November 2026. Each entry links to
the line of source code that shows it, or to the place where the feature is missing. *?*: the source code does not say.
On GPUs, MaxText uses TransformerEngine's ring.
"""


@lru_cache
def agrees(program: Program) -> bool:
    """Do output and every gradient agree with the float64 reference? False if the program is rejected."""
    try:
        judged = judge(program, [measure(program, draw_arrays(program, seed=0))])
    except (TypeError, ValueError):
        return False
    return all(error <= allowed for error, allowed in judged.values())


def sent(**options: Any) -> dict[tuple[tuple[int, ...], str], int]:
    """{(shape, dtype): sends} of a ring of eight devices with 16 local tokens, forward and backward."""
    with jax.set_mesh(ring := arrange_devices({"data": 1, "context": 8, "tensor": 1}, jax.devices())):
        f, args = abstract(ring, 16, **options)
        return permuted(gradient(f), *args)


def exists(word: str) -> bool:
    """Does a public name, an argument or a file contain `word`? For features that have no probe that could run yet."""
    files = [path.stem for path in Path(ringattn.__file__).parent.rglob("*.py")]
    return any(word in name for name in (*ringattn.__all__, *inspect.signature(attention).parameters, *files))


def merges_unrounded() -> bool:
    """Is a merge of two shards exact to one rounding?

    The means of the two shards' values are not bfloat16 numbers. The exact mean of both rounds up; the mean of the two
    rounded means is a tie and rounds down.
    """
    up = 1 + 2**-7
    value = np.ones((1, 16, 1, 4), jax.numpy.bfloat16)
    value[:, :3] = value[:, 8:] = up
    with jax.set_mesh(jax.make_mesh((2,), ("context",), devices=jax.devices()[:2])):
        arrays = (jax.device_put(x, jax.P(None, "context")) for x in (0 * value, 0 * value, value))
        return bool((attention(*arrays, mask=Mask(causal=False)) == up).all())


def run_on_accelerators() -> bool:
    """Does the README no longer list GPUs and TPUs as untested?"""
    tested = re.search(r"^\| tested on \|.*\|(.*)\|$", FRONT.read_text(encoding="utf-8"), re.M)
    assert tested, "the README has a row 'tested on'"
    return not re.search("GPU|TPU", tested[1])


# Defaults of Program: causal, float32, 64 tokens, four query heads, two K/V heads.
RING, NARROW = Program(ring=(8,)), Program(ring=(8,), mask=Mask(window=(12, 0)))
BALANCED = [Program(ring=(4,), layout="zigzag"), Program(ring=(4,), layout="striped")]


def with_extra(program: Program, extra: str) -> Program:
    return replace(program, extras=frozenset({extra}))


PROBES: dict[str, Callable[[], bool]] = {
    "ring attention, forward and gradients": lambda: agrees(RING),
    "runs on CPU with simulated devices": lambda: jax.default_backend() == "cpu" and agrees(RING),
    "fused kernels": lambda: agrees(Program(ring=(2,), length=16, heads=(2, 1), kernel="pallas")),
    "causal work balanced by the layout": lambda: all(map(agrees, BALANCED)),
    "packed documents with a balanced layout": lambda: all(
        agrees(with_extra(program, "segment_ids")) for program in BALANCED
    ),
    "sliding window in the ring": lambda: agrees(NARROW),
    # A window of 20 tokens reaches two shards of 16 tokens: two hops, not seven. Each hop sends K and V forward, and
    # K, V and the gradients of both backward.
    "skips hops beyond the window": lambda: agrees(NARROW) and sum(sent(mask=Mask(window=(20, 0))).values()) == 12,
    "bidirectional prefixes and spans": lambda: agrees(with_extra(RING, "span_ids")),
    "logit soft cap": lambda: agrees(Program(ring=(4,), soft_cap=2.0)),
    "attention sinks, with gradients": lambda: agrees(with_extra(RING, "sinks")),
    "ALiBi": lambda: agrees(with_extra(RING, "slopes")),
    "grouped K/V heads, sent unrepeated": lambda: agrees(RING) and {shape[1] for shape, _ in sent()} == {G},
    "all-gather of K/V as an alternative": lambda: agrees(Program(strategy="gather")),
    "head exchange (Ulysses), alone and with a ring": lambda: (
        agrees(Program(strategy="ulysses", ring=(2,))) and agrees(Program(strategy="usp", ring=(2, 2)))
    ),
    "nested rings": lambda: agrees(Program(ring=(2, 2))),
    "bfloat16 hops merged without rounding": merges_unrounded,
    "dropout": lambda: exists("dropout"),
    "decoding from a sharded cache": lambda: agrees(Program(queries=1)) or exists("decode"),
    "published results on GPUs or TPUs": run_on_accelerators,
}


@lru_cache
def answer(feature: str) -> str:
    return "yes" if PROBES[feature]() else "no"


def label(name: str, source: str) -> str:
    """Name of the link to a source."""
    return f"{name} {source.split('/')[-1]}"


def link(name: str, source: str) -> str:
    file, _, line = source.rpartition(":")
    return source if source.startswith("https:") else f"{OTHERS['rivals'][name]['files']}{file}#line.{line}"


def row(feature: str, ringattn_answer: str) -> str:
    """One line of the table."""
    cells = [ringattn_answer]
    for name in OTHERS["rivals"]:
        word, *source = OTHERS["cells"][feature][name]
        word, colon, limits = word.partition(":")
        cells.append(f"[{word}][{label(name, source[0])}]{colon}{limits}" if source else word)
    return f"| {feature} | {' | '.join(cells)} |"


def table(answers: dict[str, str]) -> str:
    heads = [f"[{rival['name']}]({rival['home']}) {rival['release']}" for rival in OTHERS["rivals"].values()]
    lines = [f"| | ringattn | {' | '.join(heads)} |", "|---" * (len(heads) + 2) + "|"]
    return "\n".join([LEGEND, *lines, *(row(feature, answers[feature]) for feature in PROBES)])


def sources() -> str:
    """Definitions of the table's links, each once."""
    urls = {}
    for cells in OTHERS["cells"].values():
        for name, (_, *references) in cells.items():
            for source in references:
                assert urls.setdefault(label(name, source), link(name, source)) == link(name, source), source
    return "\n".join(f"[{text}]: {target}" for text, target in sorted(urls.items()))


def rewritten(text: str, answers: dict[str, str]) -> str:
    """`text` of the guide with a new table and new link definitions."""
    for comment, content in ((TABLE, table(answers)), (SOURCES, sources())):
        before, rest = text.split(comment)
        text = f"{before}{comment}\n\n{content}\n\n{END}{rest.partition(END)[2]}"
    return text


@pytest.mark.parametrize("feature", PROBES)
def test_the_table_agrees_with_the_probe(feature):
    assert row(feature, answer(feature)) in GUIDE.read_text(encoding="utf-8").splitlines()


def test_the_table_is_up_to_date():
    text = GUIDE.read_text(encoding="utf-8")
    assert rewritten(text, {feature: answer(feature) for feature in PROBES}) == text


def test_every_cell_of_another_library_has_a_source():
    assert list(OTHERS["cells"]) == list(PROBES)
    for feature, cells in OTHERS["cells"].items():
        assert list(cells) == list(OTHERS["rivals"]), feature
        for word, *source in cells.values():
            assert (word == "?") == (not source), feature
            assert re.fullmatch(r"\?|(yes|no|partly)(: [\w ,]{2,22})?", word), word
            assert all(
                re.fullmatch(r"https://(github\.com|arxiv\.org)/\S+|[\w./-]+:\d+", reference) for reference in source
            ), source


if __name__ == "__main__":
    text = rewritten(GUIDE.read_text(encoding="utf-8"), {feature: answer(feature) for feature in PROBES})
    GUIDE.write_text(text, encoding="utf-8")
