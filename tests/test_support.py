"""What ringattn supports beside other libraries: a probe a row, and the README's table of what the probes found.

    python tests/test_support.py

runs every probe and writes the table into the README. The other libraries' cells are in support.toml.
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
from ringattn.attention.local import KERNELS
from ringattn.mesh import arrange

README = Path(__file__).parents[1] / "README.md"
OTHERS = tomllib.loads(Path(__file__).with_name("support.toml").read_text(encoding="utf-8"))
TABLE, SOURCES = "<!-- support table: python tests/test_support.py -->", "<!-- sources of the support table -->"
END = "<!-- end -->"
LEGEND = """\
Under ringattn, *yes* says that a probe in [tests/test_support.py](tests/test_support.py) ran just that on simulated
devices, its output and gradients (where hops are merged, its output) compared with dense attention in float64; *no*,
that it was refused or is not there; the last row says what stands below, under "tested on".
The others were read in November 2026, in the releases that the head names. Each word leads to the line that shows it,
or where it would have to be; *?* stands where what was read does not tell. MaxText's ring on GPUs is that of
TransformerEngine.
"""


@lru_cache
def agrees(program: Program) -> bool:
    """Whether output and every gradient are the oracle's; False, too, if the program is refused."""
    try:
        judged = judge(program, [measure(program, draw_arrays(program, seed=0))])
    except (TypeError, ValueError):
        return False
    return all(error <= allowed for error, allowed in judged.values())


def sent(**how: Any) -> dict[tuple[tuple[int, ...], str], int]:
    """How often a ring of eight devices sends what, forward and backward, with 16 tokens on each."""
    with jax.set_mesh(ring := arrange({"data": 1, "context": 8, "tensor": 1}, jax.devices())):
        f, args = abstract(ring, 16, **how)
        return permuted(gradient(f), *args)


def arrived(word: str) -> bool:
    """Whether a public name, an argument or a file is called so: of what cannot be run as long as it is not there."""
    files = [path.stem for path in Path(ringattn.__file__).parent.rglob("*.py")]
    return any(word in name for name in (*ringattn.__all__, *inspect.signature(attention).parameters, *files))


def merges_unrounded() -> bool:
    """Two shards of values whose means lie between two neighbouring bfloat16: their common mean is rounded up, but the
    mean of the rounded means is a tie, and rounded down."""
    up = 1 + 2**-7
    value = np.ones((1, 16, 1, 4), jax.numpy.bfloat16)
    value[:, :3] = value[:, 8:] = up
    with jax.set_mesh(jax.make_mesh((2,), ("context",), devices=jax.devices()[:2])):
        given = (jax.device_put(x, jax.P(None, "context")) for x in (0 * value, 0 * value, value))
        return bool((attention(*given, mask=Mask(causal=False)) == up).all())


def run_on_accelerators() -> bool:
    """Whether the README's table of what is supported no longer says that GPUs and TPUs are to come."""
    tested = re.search(r"^\| tested on \|.*\|(.*)\|$", README.read_text(encoding="utf-8"), re.M)
    assert tested, "the README says what is tested on what"
    return not re.search("GPU|TPU", tested[1])


# Causal, float32, 64 tokens, four query heads on two K/V heads, if nothing else is said.
RING, NARROW = Program(ring=(8,)), Program(ring=(8,), mask=Mask(window=(12, 0)))
BALANCED = [Program(ring=(4,), layout="zigzag"), Program(ring=(4,), layout="striped")]


def giving(program: Program, extra: str) -> Program:
    return replace(program, extras=frozenset({extra}))


PROBES: dict[str, Callable[[], bool]] = {
    "a ring, forward and gradients": lambda: agrees(RING),
    "on processors, as simulated devices": lambda: jax.default_backend() == "cpu" and agrees(RING),
    "fused kernels": lambda: set(KERNELS) > {"xla"},
    "causal work balanced by layout": lambda: all(map(agrees, BALANCED)),
    "packed documents, balanced, too": lambda: all(agrees(giving(each, "segment_ids")) for each in BALANCED),
    "a sliding window in the ring": lambda: agrees(NARROW),
    # 20 tokens back reach into two shards of 16: two hops, not seven, of K and V, of both again backward, and of their
    # gradients.
    "hops beyond a window are not made": lambda: agrees(NARROW) and sum(sent(mask=Mask(window=(20, 0))).values()) == 12,
    "prefixes and spans that see ahead": lambda: agrees(giving(RING, "span_ids")),
    "logits capped": lambda: agrees(Program(ring=(4,), soft_cap=2.0)),
    "attention sinks, with their gradient": lambda: agrees(giving(RING, "sinks")),
    "ALiBi": lambda: agrees(giving(RING, "slopes")),
    "shared K/V heads, sent unrepeated": lambda: agrees(RING) and {shape[1] for shape, _ in sent()} == {G},
    "K/V gathered instead": lambda: agrees(Program(strategy="gather")),
    "heads exchanged, alone and around a ring": lambda: (
        agrees(Program(strategy="ulysses", ring=(2,))) and agrees(Program(strategy="usp", ring=(2, 2)))
    ),
    "a ring of rings": lambda: agrees(Program(ring=(2, 2))),
    "bfloat16 hops merged unrounded": merges_unrounded,
    "dropout": lambda: arrived("dropout"),
    "decoding from a cache over devices": lambda: agrees(Program(queries=1)) or arrived("decode"),
    "published results on GPUs or TPUs": run_on_accelerators,
}


@lru_cache
def found(feature: str) -> str:
    return "yes" if PROBES[feature]() else "no"


def label(name: str, source: str) -> str:
    """What a link to the source is called in the README's text."""
    return f"{name} {source.split('/')[-1]}"


def link(name: str, source: str) -> str:
    file, _, line = source.rpartition(":")
    return source if source.startswith("https:") else f"{OTHERS['rivals'][name]['files']}{file}#line.{line}"


def row(feature: str, own: str) -> str:
    """One line of the table."""
    cells = [own]
    for name in OTHERS["rivals"]:
        word, *source = OTHERS["cells"][feature][name]
        word, colon, limits = word.partition(":")
        cells.append(f"[{word}][{label(name, source[0])}]{colon}{limits}" if source else word)
    return f"| {feature} | {' | '.join(cells)} |"


def table(own: dict[str, str]) -> str:
    heads = [f"[{each['name']}]({each['home']}) {each['release']}" for each in OTHERS["rivals"].values()]
    lines = [f"| | ringattn | {' | '.join(heads)} |", "|---" * (len(heads) + 2) + "|"]
    return "\n".join([LEGEND, *lines, *(row(feature, own[feature]) for feature in PROBES)])


def sources() -> str:
    """Where the words lead, each place once."""
    used = {}
    for cells in OTHERS["cells"].values():
        for name, (_, *places) in cells.items():
            for source in places:
                assert used.setdefault(label(name, source), link(name, source)) == link(name, source), source
    return "\n".join(f"[{text}]: {target}" for text, target in sorted(used.items()))


def rewritten(text: str, own: dict[str, str]) -> str:
    """The README with both parts anew, ringattn's own cells as given."""
    for comment, content in ((TABLE, table(own)), (SOURCES, sources())):
        before, rest = text.split(comment)
        text = f"{before}{comment}\n\n{content}\n\n{END}{rest.partition(END)[2]}"
    return text


@pytest.mark.parametrize("feature", PROBES)
def test_the_readme_says_what_the_probe_finds(feature):
    assert row(feature, found(feature)) in README.read_text(encoding="utf-8").splitlines()


def test_the_command_would_change_nothing():
    text = README.read_text(encoding="utf-8")
    assert rewritten(text, {feature: found(feature) for feature in PROBES}) == text


def test_every_cell_of_the_others_has_its_source():
    assert list(OTHERS["cells"]) == list(PROBES)
    for feature, cells in OTHERS["cells"].items():
        assert list(cells) == list(OTHERS["rivals"]), feature
        for word, *source in cells.values():
            assert (word == "?") == (not source), feature
            assert re.fullmatch(r"\?|(yes|no|partly)(: [\w ,]{2,22})?", word), word
            assert all(re.fullmatch(r"https://(github\.com|arxiv\.org)/\S+|[\w./-]+:\d+", each) for each in source), (
                source
            )


if __name__ == "__main__":
    text = rewritten(README.read_text(encoding="utf-8"), {feature: found(feature) for feature in PROBES})
    README.write_text(text, encoding="utf-8")
