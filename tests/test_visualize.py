"""The pictures say what the ring does: the schedule, what is seen, how much work it is, in numbers."""

import math
import re
import runpy
import sys
import xml.etree.ElementTree as ET
from collections import Counter
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from matplotlib.patches import Rectangle

from ringattn.attention.kernels import Keys, Queries, Rule
from ringattn.attention.mask import Mask, Tokens
from ringattn.attention.ring import Ring
from ringattn.attention.softmax import Partial
from ringattn.layout import LAYOUTS
from ringattn.visualize import (
    COLOURS,
    Need,
    Row,
    Shape,
    animate,
    attention_bytes,
    balance_figure,
    balance_text,
    doubling,
    draw,
    fit,
    full_hops,
    hops_made,
    imbalance,
    mask_figure,
    memory,
    memory_curves,
    memory_figure,
    memory_text,
    overlap_figure,
    owners,
    pairs,
    reach_figure,
    schedule_text,
    seen,
    visitors,
)

ROOT = Path(__file__).parents[1]
SVG = "{http://www.w3.org/2000/svg}"


def two_documents(length: int) -> np.ndarray:
    """A quarter of the tokens, then the rest."""
    return np.repeat(np.array([0, 1], np.int32), [length // 4, 3 * length // 4])


@pytest.mark.parametrize(("name", "picture", "flag"), [("ring", draw, ""), ("ring_animated", animate, " --animate")])
def test_the_committed_pictures_are_what_the_code_draws(name, picture, flag):
    committed = (ROOT / "notebooks" / "images" / f"{name}.svg").read_text(encoding="utf-8")
    assert committed == picture(), f"draw it again: python -m ringattn.visualize notebooks/images/{name}.svg{flag}"


@pytest.mark.parametrize("devices", range(3, 9))
def test_every_query_sees_every_shard_exactly_once(devices):
    for device, row in enumerate(visitors(devices)):
        assert row[0] == device
        assert sorted(row) == list(range(devices))
    for column in zip(*visitors(devices), strict=True):
        assert sorted(column) == list(range(devices)), "a shard is at one device at a time"


def test_the_schedule_is_that_of_the_ring(make_mesh):
    """A kernel that writes down, digit after digit, whose keys it is given."""

    def write(rule, queries, keys, slopes, part):
        return part._replace(out=10 * part.out + keys.key)

    ring = Ring("context", "contiguous", SimpleNamespace(forward=write))
    nowhere = Tokens(np.zeros((1, 1), np.int32))

    def visits(home):
        nothing = Partial(0 * home, home[..., 0])
        return ring.forward(
            Rule(Mask(), 1.0), Queries(home[None], nowhere), Keys(home, home, nowhere), None, nothing
        ).out

    spread = jax.P(None, None, "context")
    with jax.set_mesh(make_mesh(context=4)):
        homes = jax.device_put(np.arange(1, 5, dtype=np.float32)[None, None, :, None], spread)
        written = jax.shard_map(visits, in_specs=spread, out_specs=spread)(homes)
    expected = [sum((home + 1) * 10 ** (3 - hop) for hop, home in enumerate(row)) for row in visitors(4)]
    np.testing.assert_array_equal(np.ravel(written), np.array(expected, np.float32))


def test_the_owners_of_tokens_are_those_of_the_layout():
    assert owners(4, "contiguous") == [0, 0, 1, 1, 2, 2, 3, 3]
    assert owners(4, "striped") == [0, 1, 2, 3, 0, 1, 2, 3]
    assert owners(4, "zigzag") == [0, 1, 2, 3, 3, 2, 1, 0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_bars_fill_up_with_the_visits(layout):
    """Of the d shards that a device has seen after hop d - 1, 2 d tokens are coloured; a token of each is two wide."""
    devices = 4
    bars = Counter(re.findall(r'height="11.0" fill="(#\w+)"', draw(devices, layout)))
    coloured = devices * sum(2 * seen for seen in range(1, devices + 1))
    assert sum(bars.values()) == devices * devices * 2 * devices
    assert sum(bars[colour] for colour in COLOURS) == coloured
    assert len({bars[colour] for colour in COLOURS[:devices]}) == 1, "no shard is seen more often than another"


@pytest.mark.parametrize(("devices", "layout", "message"), [(9, "zigzag", "devices=9"), (4, "spiral", "'spiral'")])
@pytest.mark.parametrize("picture", [draw, animate])
def test_what_cannot_be_drawn(picture, devices, layout, message):
    with pytest.raises(ValueError, match=message):
        picture(devices, layout)


def animations(picture: str, name: str) -> list[tuple[list[str], list[float]]]:
    """(values, the steps at which each holds) of all animations of an attribute, or of all motions."""
    root, found = ET.fromstring(picture), []
    for element in root.iter():
        if element.tag.startswith(f"{SVG}animate"):
            assert element.get("repeatCount") == "indefinite"
            values = (element.get("values") or element.get("keyPoints") or "").split(";")
            times = [float(time) for time in (element.get("keyTimes") or "").split(";")]
            assert len(values) == len(times)
            assert times == sorted(times)
            assert times[0] == 0
            assert times[-1] == 1 or element.get("calcMode") == "discrete"
            length = float((element.get("dur") or "").removesuffix("s"))
            if element.get("attributeName", "motion") == name:
                found.append((values, [time * length / 2.4 for time in times]))
    return found


@pytest.mark.parametrize("devices", [3, 4, 8])
def test_shards_change_hands_as_on_the_ring(devices):
    picture = animate(devices)
    places = [values for values, _ in animations(picture, "transform")]
    homes = {each[0]: device for device, each in enumerate(places)}
    for home, (values, steps) in enumerate(animations(picture, "transform")):
        at = [homes[value] for value in values]
        assert [visitors(devices)[device][hop] for hop, device in enumerate(at)] == [home] * devices
        np.testing.assert_allclose(steps, range(devices), atol=0.01)


def test_a_copy_arrives_before_it_is_needed():
    devices = 4
    motions = animations(animate(devices), "motion")
    assert len(motions) == devices
    for points, steps in motions:
        way = dict(zip(np.round(steps, 1), map(float, points), strict=True))
        for hop in range(1, devices):
            assert way[hop - 0.2] == way[hop] == pytest.approx(hop / (devices - 1), abs=1e-3)


def test_where_nothing_moves_copies_are_hidden_at_home():
    """Each is placed where its path begins, the middle of a device's circle, which is drawn later and is larger."""
    devices, picture = 4, animate(4)
    root = ET.fromstring(picture)
    placed = [each for each in root if each.tag == f"{SVG}g" and each.find(f"{SVG}g/{SVG}animateMotion") is not None]
    circles = [each for each in root if each.tag == f"{SVG}circle" and each.get("r") == "46"]
    assert len(placed) == len(circles) == devices
    for copy, circle in zip(placed, circles, strict=True):
        assert copy.get("transform") == f"translate({circle.get('cx')} {circle.get('cy')})"
        motion = copy.find(f"{SVG}g/{SVG}animateMotion")
        assert motion is not None
        assert (motion.get("path") or "").startswith("M0,0A")
        assert list(root).index(copy) < list(root).index(circle)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bars_grow_while_their_shard_is_at_work(layout):
    devices = 4
    sequence = owners(devices, layout)
    bars = iter(animations(animate(devices, layout), "width"))
    for row in visitors(devices):
        for owner, _ in groupby(sequence):
            values, steps = next(bars)
            start = max(at for at, value in zip(steps, values, strict=True) if value == "0")
            full = min(at for at, value in zip(steps, values, strict=True) if value != "0")
            assert (start, full) == pytest.approx((row.index(owner), row.index(owner) + 1), abs=0.01)
    assert next(bars, None) is None


def test_the_animation_is_small_and_needs_no_script():
    assert len(animate()) < 20_000
    assert not re.search(r"(?i)<script|javascript|href", animate())


def test_causal_work_is_balanced_in_zigzag():
    row = Row(512, 8, "zigzag")
    assert imbalance(row) == 1
    half = row.local // 2
    work = pairs(row)
    np.testing.assert_array_equal(work[:, 1:], 2 * half**2)
    np.testing.assert_array_equal(work[:, 0], row.local * (row.local + 1) // 2)


def test_causal_work_in_contiguous_and_striped():
    p, c = 8, 64
    triangle, less = c * (c + 1) // 2, c * (c - 1) // 2
    for device, hop in np.ndindex(p, p):
        contiguous = triangle if hop == 0 else c * c * (hop <= device)
        assert pairs(Row(p * c, p, "contiguous"))[device, hop] == contiguous
        assert pairs(Row(p * c, p, "striped"))[device, hop] == (triangle if hop <= device else less)
    time, mean = full_hops(Row(p * c, p, "contiguous"))
    assert time == pytest.approx(triangle / c**2 + p - 1)
    assert mean == pytest.approx(triangle / c**2 + (p - 1) / 2)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_that_is_seen_is_somebodys_work(layout):
    ids, spans = two_documents(64), np.where(np.arange(64) < 10, 0, -1).astype(np.int32)
    for row in (
        Row(64, 4, layout),
        Row(64, 4, layout, Mask(causal=False)),
        Row(64, 4, layout, Mask(window=(9, 0))),
        Row(64, 4, layout, segment_ids=ids),
        Row(64, 4, layout, span_ids=spans),
    ):
        natural = seen(replace(row, layout="contiguous"))
        assert pairs(row).sum() == seen(row).sum() == natural.sum()
    assert natural[0, 9]
    assert not natural[0, 10]
    documents = seen(Row(64, 4, segment_ids=ids))
    assert documents.sum() == 16 * 17 // 2 + 48 * 49 // 2


@pytest.mark.parametrize("left", [1, 15, 16, 17, 32, 33, 100])
def test_hops_vanish_beyond_a_window(left):
    row = Row(128, 8, mask=Mask(window=(left, 0)))
    made = hops_made(row)
    assert len(made) == math.ceil(left / row.local)
    gone = [hop for hop in range(1, 8) if hop not in made]
    assert not pairs(row)[:, gone].any()
    assert pairs(row)[:, list(made)].any(0).all()


def test_a_window_to_both_sides_comes_from_both_sides():
    assert hops_made(Row(128, 8, mask=Mask(causal=False, window=16))) == (1, 7)
    spans = np.zeros(128, np.int32)
    assert hops_made(Row(128, 8, mask=Mask(window=16), span_ids=spans)) == (1, 7), "causal, but for spans"
    assert hops_made(Row(128, 8, span_ids=spans)) == tuple(range(1, 8))


def test_a_hop_takes_as_long_as_its_slowest_device():
    """All 16 tokens of device 0 are one document, and so are 8 of device 2 and 8 of device 3: the others are alone."""
    ids = np.arange(64, dtype=np.int32)
    ids[:16], ids[40:56] = 0, 40
    row = Row(64, 4, segment_ids=ids)
    np.testing.assert_array_equal(pairs(row)[:, 0], [136, 16, 44, 44])
    np.testing.assert_array_equal(pairs(row)[:, 1], [0, 0, 0, 64])
    time, mean = full_hops(row)
    assert time == pytest.approx((136 + 64) / 256)
    assert mean == pytest.approx((136 + 16 + 44 + 44 + 64) / 4 / 256)
    assert imbalance(row) == pytest.approx(time / mean)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"length": 100}, "112"),
        ({"segment_ids": np.zeros(3, np.int32)}, "segment_ids"),
        ({"layout": "x"}, "'x'"),
        ({"tile": 3}, "tile=3"),
    ],
)
def test_rows_that_do_not_fit(wrong, message):
    with pytest.raises(ValueError, match=message):
        Row(**({"length": 64, "shards": 8, "layout": "zigzag"} | wrong))


def test_tiles_are_computed_whole_or_not_at_all():
    p, c, tile = 4, 16, 4
    work = pairs(Row(p * c, p, "contiguous", tile=tile))
    np.testing.assert_array_equal(work[:, 0], tile**2 * (c // tile) * (c // tile + 1) // 2)
    np.testing.assert_array_equal(work[:, 1], [0, c * c, c * c, c * c])
    assert imbalance(Row(p * c, p, "zigzag", tile=tile)) == 1
    documents = Row(p * c, p, "striped", segment_ids=two_documents(p * c), tile=c)
    assert (pairs(documents) == c * c).all(), "a tile of striped tokens reaches over the whole row"


def test_figures_show_the_numbers():
    rows = {"even": Row(64, 4, "zigzag"), "window": Row(64, 4, mask=Mask(window=(16, 0)))}
    figure = balance_figure(rows)
    for axes, (title, row) in zip(figure.axes, rows.items(), strict=False):
        shown = axes.images[0].get_array()
        assert shown is not None
        np.testing.assert_allclose(shown, 100 * pairs(row) / row.local**2)
        assert axes.get_title().startswith(f"{title}\nmax/mean {imbalance(row):.2f};")
        hatched = [patch for patch in axes.patches if patch.get_hatch()]
        assert len(hatched) == row.shards - 1 - len(hops_made(row))
    for axes, row in zip(mask_figure(rows).axes, rows.values(), strict=True):
        shown = axes.images[0].get_array()
        assert shown is not None
        np.testing.assert_array_equal((np.asarray(shown) < 1).any(-1), seen(row))


def test_text_says_what_the_pictures_say():
    first = schedule_text(3).splitlines()[1]
    assert first.split() == ["device", "0", "K/V", "0", "##....", "K/V", "2", "##..##", "K/V", "1", "######"]
    text = balance_text(Row(64, 4, mask=Mask(window=(16, 0)))).splitlines()
    assert text[3].split() == ["device", "1", "53.1%", "53.1%", "-", "-"]
    assert text[-1].startswith("max/mean 1.14: ")


SMALL = Shape(heads=4, kv_heads=2, head_dim=32, dtype="float32")


def test_a_gather_takes_the_keys_of_all_devices_and_a_ring_does_not():
    length = 8 * 2048
    gather, ring = (attention_bytes(strategy, length, 8, shape=SMALL) for strategy in ("gather", "ring"))
    keys = length * SMALL.kv_heads * SMALL.head_dim * 4
    assert 2 * keys / 8 < ring < 4 * keys <= gather, "keys, values and the gradients of both, of the whole row"


def test_dense_attention_takes_logits_of_all_pairs():
    short, long = (attention_bytes("dense", length, 8, shape=SMALL) for length in (2048, 4096))
    assert long >= 2 * 4 * 4 * 4096**2, "logits and their gradients, or weights, of four heads"
    assert doubling({2048: short, 4096: long}) == pytest.approx(4, rel=0.05)


@pytest.mark.parametrize(("strategy", "devices"), [("dense", 1), ("gather", 8), ("ring", 8)])
def test_the_whole_counts_arguments_and_results(strategy, devices):
    """Query, key, value, output, and a gradient of each: of the tokens that the device holds."""
    temporary, whole = (attention_bytes(strategy, 2048, devices, shape=SMALL, whole=each) for each in (False, True))
    held = 2048 // devices * 4 * (SMALL.heads + SMALL.kv_heads) * SMALL.head_dim * 4
    assert held <= whole - temporary < held + 100, "and a few pointers"


def test_what_fits_no_memory_can_be_asked_for():
    assert attention_bytes("dense", memory.longest_dense(), 1) > 2**39


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"devices": 9}, "a ring of 9 does not fit 8 devices"),
        ({"length": 100}, "112"),
        ({"strategy": "x"}, "'x'"),
        ({"strategy": "dense", "length": 2**16}, "length=65536 .* 32 heads: ask for up to 32768"),
    ],
)
def test_what_cannot_be_compiled(wrong, message):
    with pytest.raises(ValueError, match=message):
        attention_bytes(**({"strategy": "ring", "length": 128, "devices": 8} | wrong))


def test_curves_are_of_dense_gather_and_ring(monkeypatch):
    asked = []
    monkeypatch.setattr(memory, "attention_bytes", lambda *words: asked.append(words) or len(asked))
    longer = 2 * memory.longest_dense(SMALL)
    assert memory_curves([16, longer], 8, "striped", SMALL) == {
        "dense": {16: 1},
        "gather": {16: 2, longer: 3},
        "ring": {16: 4, longer: 5},
    }
    assert asked[-1] == ("ring", longer, 8, "striped", SMALL)


def test_a_law_is_found_again_and_turned_round():
    law = Need(own=5.0, row=3.0)
    found = fit({devices: 1000 * (5 + 3 * devices) for devices in (2, 4, 8)}, 1000)
    np.testing.assert_allclose(found, law)
    length = law.reach(2**30, 4)
    assert length / 4 * (law.own + law.row * 4) == pytest.approx(2**30)
    flat = fit({2: 7001, 4: 7000, 8: 6999}, 1000)
    assert flat.row == 0, "noise, by which memory would shrink with the devices"
    assert flat.reach(1.0, 64) == pytest.approx(8 * flat.reach(1.0, 8))


@pytest.mark.parametrize("power", [0, 1, 2])
def test_doubling_tells_the_power(power):
    assert doubling({x: 3 * x**power for x in (4, 16, 64)}) == pytest.approx(2**power)


CURVES = {"dense": {2**14: 2**37, 2**16: 2**41}, "ring": {2**14: 2**27, 2**16: 2**29}}


def test_memory_as_text():
    lines = [line.split() for line in memory_text(CURVES | {"gather": {2**14: 1000, 2**18: 16_000}}).splitlines()]
    assert lines[1] == ["tokens", "dense", "ring", "gather"]
    assert lines[2] == ["16,384", "128", "GiB", "128", "MiB", "1,000", "bytes"]
    assert lines[3] == ["65,536", "2", "TiB", "512", "MiB"]
    assert lines[4] == ["262,144", "15.62", "KiB"]
    assert lines[5] == ["a", "doubling", "x", "4.00", "x", "2.00", "x", "2.00"]
    one = memory_text({"ring": {2: 1024}}, "devices").splitlines()
    assert one[1].split() == ["devices", "ring"]
    assert one[-1].split() == ["a", "doubling", "-"]


def test_a_figure_of_memory_shows_the_curves():
    axes = memory_figure(CURVES, "tokens of the row", {"a chip": 2**34}).axes[0]
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("tokens of the row", "temporary memory of a device")
    lines = {str(line.get_label()): line for line in axes.lines}
    for name, curve in CURVES.items():
        np.testing.assert_array_equal(lines[name].get_xydata(), list(curve.items()))
    np.testing.assert_array_equal(lines["a chip"].get_ydata(), 2**34)
    ring = memory_figure({"ring": {2: 2**29, 8: 2**29}}, "devices", logarithmic=False).axes[0]
    assert ring.get_yscale() == "linear"
    assert ring.get_ylim()[0] == 0
    assert ring.lines[0].get_color() == lines["ring"].get_color(), "a strategy has its colour in all figures"
    assert [ring.xaxis.get_major_formatter()(x, None) for x in ring.get_xticks()] == ["2", "8"]


def test_a_figure_of_reach_says_what_is_a_law_alone():
    reached = {"gather": {2: 100.0, 8: 200.0, 64: 250.0}, "ring": {2: 100.0, 8: 400.0, 64: 3200.0}}
    axes = reach_figure(reached, 8, "in 1 GiB").axes[0]
    known, beyond = ([line for line in axes.lines if line.get_linestyle() == style] for style in ("-", "--"))
    assert [line.get_label() for line in known] == ["gather", "ring"]
    assert str(beyond[-1].get_label()) == "beyond 8 devices: the law alone"
    np.testing.assert_array_equal(known[1].get_xydata(), [(2, 100), (8, 400)])
    np.testing.assert_array_equal(beyond[0].get_xydata(), [(8, 200), (64, 250)])
    assert axes.get_title() == "in 1 GiB"


def test_a_figure_of_overlap_has_a_bar_a_chip_and_kind():
    axes = overlap_figure({"slow": {"plain": 500.0, "half": 1000.0}, "fast": {"plain": 1200.0, "half": 2400.0}}).axes[0]
    boxes = [bar.get_bbox() for bar in axes.patches if isinstance(bar, Rectangle)]
    widths = sorted((round((box.y0 + box.y1) / 2, 1), round(box.width)) for box in boxes)
    assert widths == [(-0.2, 500), (0.2, 1000), (0.8, 1200), (1.2, 2400)]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["slow", "fast"]
    assert {text.get_text() for text in axes.texts} == {"500", "1,000", "1,200", "2,400"}
    assert "tokens a device" in axes.get_xlabel()


def test_the_command(tmp_path, monkeypatch, capsys):
    def command(*words):
        monkeypatch.setattr(sys, "argv", ["visualize", *map(str, words)])
        runpy.run_module("ringattn.visualize", run_name="__main__")

    command(tmp_path / "new" / "ring.svg", "--devices", 5, "--animate")
    assert (tmp_path / "new" / "ring.svg").read_text(encoding="utf-8") == animate(5)
    command("--layout", "zigzag")
    assert capsys.readouterr().out.startswith(schedule_text(4, "zigzag"))
    with pytest.raises(SystemExit):
        command("--animate")

    def planned(lengths, devices, layout):
        return {f"{layout} on {devices}": {length: length * 2**20 for length in lengths}}

    monkeypatch.setattr("ringattn.visualize.memory_curves", planned)
    command("--memory", "--devices", 8, "--layout", "striped")
    shown = capsys.readouterr().out
    assert "striped on 8" in shown
    assert "1,048,576" in shown
    with pytest.raises(SystemExit):
        command("ring.svg", "--memory")
