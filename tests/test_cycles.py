"""Cycles are read from what the TPU compiler writes, and tiles counted as the kernels visit them."""

import json
import re
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from ringattn import config
from ringattn.attn.mask import Mask, Tokens, visible
from ringattn.benchmark import cycle_report, cycles, kernel_rows
from ringattn.benchmark.report import make_console
from ringattn.cost import attention_kernels
from ringattn.cost.attention_kernels import KernelSpec
from ringattn.cost.cycles import CORES, CYCLE_FLOPS, KernelSchedule, TileCounts, kernel_schedule
from ringattn.cost.program import KernelCall, Program, TileTrips
from ringattn.cost.visited import Ring, Tiling, count_tiles, ring_counts
from ringattn.hardware import CHIPS
from ringattn.planning.kernel_schedules import kernel_schedules

HLO = """
%wide.region_0.2.sunk (p: ()) -> () {
  %constant.24..sunk = s32[] constant(1)
  %gte.248 = s32[] get-tuple-element(%wide.arg_tuple.0), index=3
  %gte.247 = s32[] get-tuple-element(%wide.arg_tuple.0), index=2
  %gte.242 = s32[] get-tuple-element(%wide.arg_tuple.0), index=1
  %copy.33 = s32[] copy(%gte.242), backend_config={"estimated_cycles":"10856"}
  %conv_tanh_fusion.2 = s32[] fusion(%copy.33, %gte.247), backend_config={"estimated_cycles":"21340"}
  ROOT %tuple.59 = s32[] tuple(%add.9, %conv_tanh_fusion.2, %gte.247, %gte.248)
}
%wide.region_1.3 (p: ()) -> () {
  %constant.26 = s32[] constant(5)
  %gte.136 = s32[] get-tuple-element(%wide.arg_tuple.3), index=0
  ROOT %lt.6 = s32[] compare(%gte.136, %constant.26), direction=LT
}
%wide.region_3.4.sunk (p: ()) -> () {
  %constant.24..sunk.2..sunk = s32[] constant(1)
  %gte.219 = s32[] get-tuple-element(%wide.arg_tuple.2), index=2
  %gte.221 = s32[] get-tuple-element(%wide.arg_tuple.2), index=4
  %gte.220 = s32[] get-tuple-element(%wide.arg_tuple.2), index=3
  %gte.213 = s32[] get-tuple-element(%wide.arg_tuple.2), index=1
  %conv_sine_fusion.2 = s32[] fusion(%gte.213, %gte.220), backend_config={"estimated_cycles":"46365"}
  %copy.5 = s32[] copy(%conv_sine_fusion.2), backend_config={"estimated_cycles":"10856"}
  ROOT %tuple.53 = s32[] tuple(%add.11, %copy.5, %gte.219, %gte.220, %gte.221)
}
%wide.region_4.5 (p: ()) -> () {
  %gte.101 = s32[] get-tuple-element(%wide.arg_tuple.8), index=2
  %gte.100 = s32[] get-tuple-element(%wide.arg_tuple.8), index=0
  ROOT %lt.2 = s32[] compare(%gte.100, %gte.101), direction=LT
}
%wide.region_5.6.sunk (p: ()) -> () {
  %constant.24..sunk.3..sunk = s32[] constant(1)
  %gte.234 = s32[] get-tuple-element(%wide.arg_tuple.4), index=2
  %gte.236 = s32[] get-tuple-element(%wide.arg_tuple.4), index=4
  %gte.235 = s32[] get-tuple-element(%wide.arg_tuple.4), index=3
  %gte.228 = s32[] get-tuple-element(%wide.arg_tuple.4), index=1
  %conv_cosine_fusion.2 = s32[] fusion(%gte.228, %gte.235), backend_config={"estimated_cycles":"46365"}
  %copy.11 = s32[] copy(%conv_cosine_fusion.2), backend_config={"estimated_cycles":"10856"}
  ROOT %tuple.56 = s32[] tuple(%add.12, %copy.11, %gte.234, %gte.235, %gte.236)
}
%wide.region_6.7 (p: ()) -> () {
  %gte.119 = s32[] get-tuple-element(%wide.arg_tuple.12), index=2
  %gte.118 = s32[] get-tuple-element(%wide.arg_tuple.12), index=0
  ROOT %lt.4 = s32[] compare(%gte.118, %gte.119), direction=LT
}
%ww.region_2.9.sunk (p: ()) -> () {
  %constant.19..sunk = s32[] constant(0)
  %constant.24..sunk.1 = s32[] constant(1)
  %constant.24..sunk.2 = s32[] constant(1)
  %constant.24..sunk.3 = s32[] constant(1)
  %copy.34 = s32[] copy(%constant.19..sunk)
  %gte.270 = s32[] get-tuple-element(%ww.arg_tuple.0), index=3
  %copy.6 = s32[] copy(%gte.270)
  %gte.271 = s32[] get-tuple-element(%ww.arg_tuple.0), index=4
  %gte.272 = s32[] get-tuple-element(%ww.arg_tuple.0), index=5
  %gte.273 = s32[] get-tuple-element(%ww.arg_tuple.0), index=6
  %gte.274 = s32[] get-tuple-element(%ww.arg_tuple.0), index=7
  %gte.275 = s32[] get-tuple-element(%ww.arg_tuple.0), index=8
  %gte.269 = s32[] get-tuple-element(%ww.arg_tuple.0), index=2
  %gte.259 = s32[] get-tuple-element(%ww.arg_tuple.0), index=1
  %tuple.51 = s32[] tuple(%copy.34, %gte.259, %gte.270, %gte.269, %constant.24..sunk.2)
  %while.37 = s32[] while(%tuple.51), condition=%wide.region_4.5, body=%wide.region_3.4.sunk
  %gte.223 = s32[] get-tuple-element(%while.37), index=1
  %gte.280 = s32[] get-tuple-element(%while.37), index=3
  %tuple.70 = s32[] tuple(%copy.6, %gte.223, %gte.271, %gte.280, %constant.24..sunk.3)
  %while.38 = s32[] while(%tuple.70), condition=%wide.region_6.7, body=%wide.region_5.6.sunk
  %gte.268 = s32[] get-tuple-element(%while.38), index=1
  %gte.281 = s32[] get-tuple-element(%while.38), index=3
  ROOT %tuple.62 = s32[] tuple(%add.10, %gte.268, %gte.281, %gte.270, %gte.271)
}
%ww.region_7.10 (p: ()) -> () {
  %constant.33 = s32[] constant(3)
  %gte.149 = s32[] get-tuple-element(%ww.arg_tuple.15), index=0
  ROOT %lt.8 = s32[] compare(%gte.149, %constant.33), direction=LT
}
%region_8.11 (p: ()) -> () {
  ROOT %while.6 = s32[] parameter(0)
}
%region_9.12 (p: ()) -> () {
  %gte.63 = s32[] get-tuple-element(%arg_tuple.17), index=1
  %gte.62 = s32[] get-tuple-element(%arg_tuple.17), index=0
  %copy.31 = s32[] copy(%gte.62)
  %conv_exponential_fusion = s32[] fusion(%copy.31, %gte.63), backend_config={"estimated_cycles":"24051"}
  ROOT %tuple.64 = s32[] tuple(%conv_exponential_fusion)
}
ENTRY %main.13 (p: ()) -> () {
  %constant.19 = s32[] constant(0)
  %constant.18 = s32[] constant(3)
  %constant.2 = s32[] constant(2)
  %constant.24 = s32[] constant(1)
  %copy.18 = s32[] copy(%constant.19)
  %copy.12 = s32[] copy(%constant.19)
  %copy.30 = s32[] copy(%n.1)
  %gt.1 = s32[] compare(%copy.30, %constant.18), direction=GT
  %tuple.68 = s32[] tuple(%copy.12, %copy-done.1, %copy-done.2, %constant.24)
  %while.24 = s32[] while(%tuple.68), condition=%wide.region_1.3, body=%wide.region_0.2.sunk
  %gte.250 = s32[] get-tuple-element(%while.24), index=1
  %gte.279 = s32[] get-tuple-element(%while.24), index=2
  %tuple.69 = s32[] tuple(%copy.18, %gte.250, %gte.279, %n.1, %mul.2, %constant.24)
  %while.36 = s32[] while(%tuple.69), condition=%ww.region_7.10, body=%ww.region_2.9.sunk
  %tuple.65 = s32[] tuple(%copy-done)
  %gte.282 = s32[] get-tuple-element(%while.36), index=2
  %tuple.71 = s32[] tuple(%copy-done, %gte.282)
  %cond.3.clone = s32[] conditional(%convert.1, %tuple.65, %tuple.71), branch_computations={%region_8.11, %region_9.12}
  ROOT %gte.1 = s32[] get-tuple-element(%cond.3.clone), index=0
}
"""
"""Scheduled HLO for a v5e, without types, metadata and what costs nothing: x = tanh(x @ w) five times; three times, n
times x = sin(x @ w) and then 2n - n times x = cos(x @ w); exp(x @ w) if n > 3."""

CALL = (
    "  %ringattn_backward.8 = (f32[1,8,4,16384,128]{4,3,2,1,0:T(8,128)}, f32[1,8,8192,128]{3,2,1,0}) custom-call("
    '%a, /*index=5*/%b), custom_call_target="tpu_custom_call", operand_layout_constraints={s32[512]{0}, '
    "bf16[1,8,4,16384,128]{4,3,2,1,0}, bf16[1,8,4,16384,128]{4,3,2,1,0}, f32[1,8,4,16384]{3,2,1,0}, "
    "s32[1,1,16384]{2,1,0}, bf16[1,8,8192,128]{3,2,1,0}, bf16[1,8,8192,128]{3,2,1,0}}"
)


def bundles(*segments: tuple[str, int]) -> str:
    """A kernel's schedule: for each segment, a first line that was written for a v5e, and a number of equal bundles."""
    lines, address = ["LB: loop body"], 0
    for first, count in segments:
        match = re.fullmatch(r"([A-Z]{2})? *(>*) ?(.*)", first)
        assert match is not None
        label, depth, last = match.groups()
        for n in range(count):
            content = last if last and n == count - 1 else "{ %25021 = vst [vmem:[%s31323_s20 + $0x3d8] sm:$0xff] }"
            lines.append(f"{hex(address):>6} {label if n == 0 and label else '  '}: {depth} {content}")
            address += 1
    return "\n".join(lines)


FORWARD = bundles(
    ("", 22),
    ("LB > { %508 = sbr.rel (%p505_p13) target = $region32 }", 78),
    ("> ", 35),
    ("LB >> { %1944 = sbr.rel (!%p1941_p5) target = $region239 }", 9),
    ("PF > { %24699 = sbr.rel (%p24825_p0) target = $region244 }", 533),
    ("> ", 4),
    ("LB >> ", 12),
    ("LB >>> ", 9),
    ("PF >> { %2028 = sbr.rel (%p31997_p11) target = $region93 }", 59),
    (">> ", 2222),
    ("PF >> { %10898 = sbr.rel (!%p31997_p11) target = $region97 }", 1),
    (">> ", 2295),
    ("PF >> { %1926 = sbr.rel (!%p56921_p13) target = $region250 }", 2),
    ("PF > ", 751),
)
"""The forward kernel of ringattn."""
SPLASH = bundles(
    ("", 33),
    ("LB > { %118 = sbr.rel (%p5_p3) target = $region9 }", 148),
    ("> ", 193),
    ("PF > { %119 = sbr.rel (%p6_p3) target = $region10 }", 15),
    ("> ", 1147),
    ("PF > { %120 = sbr.rel (%p7_p3) target = $region11 }", 3),
    ("> ", 423),
    ("PF > ", 61),
)
"""The forward kernel of splash attention, whose grid steps are pairs of tiles."""


def test_a_kernel_that_loops_over_tiles():
    schedule = kernel_schedule(FORWARD)
    bookkeeping = 9 + 12 + 59 + 1 + 2
    assert schedule == KernelSchedule(
        step=78 + 35 + 533 + 4 + 751, full=bookkeeping + 2222, partial=bookkeeping + 2295, search=9
    )


def test_large_segments_of_steps_that_visit_a_tile():
    """The first large segment of a grid step, which copies, is not counted; the others are work of such steps."""
    copies = bundles(("LB > ", 60), ("PF > ", 130), ("PF > ", 520), ("LB >> ", 2300), ("PF > ", 700))
    assert kernel_schedule(copies, skips_steps=True) == KernelSchedule(60, 2300, 2300, work=520 + 700)
    counts = TileCounts(steps=4, full=6, partial=0, idle=1)
    assert kernel_schedule(copies, skips_steps=True).cycles(counts) == 4 * 60 + 3 * 1220 + 6 * 2300


def test_a_kernel_whose_grid_steps_are_tiles():
    assert kernel_schedule(SPLASH) == KernelSchedule(step=148 + 15 + 3 + 61, full=1147, partial=1147, ends=193 + 423)


def test_a_kernel_that_is_never_masked():
    unmasked = bundles(("LB > ", 100), ("LB >> ", 2300), ("PF > ", 50))
    assert kernel_schedule(unmasked) == KernelSchedule(step=150, full=2300, partial=2300)


def test_an_empty_bundle_belongs_to_the_loop_before():
    lines = FORWARD.splitlines()
    place = next(n for n, line in enumerate(lines) if ">>>" in line)
    lines.insert(place + 1, "  0x30   :  {}")
    assert kernel_schedule("\n".join(lines)).search == 10


def test_cycles_of_a_call():
    schedule, counts = KernelSchedule(1000, 10, 12, 3, 7), TileCounts(4, 20, 5, 6)
    assert schedule.cycles(counts, rows=2) == 4000 + 200 + 60 + 18 + 14
    assert schedule.cycles(counts, rows=2, cores=2) == schedule.cycles(counts, rows=2) / 2


def test_loops_multiply_the_cycles_of_ops():
    program = Program(HLO, TileTrips(4, 1.5, 8192))
    tanh, sine, cosine, exponential, copy = 21340, 46365, 46365, 24051, 10856
    inner = 4 * (sine + copy) + 1.5 * (cosine + copy)
    assert program.cost.cycles == 5 * (copy + tanh) + 3 * inner + exponential
    assert not program.cost.calls
    trips = [(loop.trips, loop.runs, loop.body.cycles) for loop in program.loops()]
    assert trips == [(5, 1, copy + tanh), (3, 1, inner), (4, 3, sine + copy), (1.5, 3, cosine + copy)]


def test_a_call_of_half_the_keys_has_half_the_trips():
    """As in the backward pass of a ring, which attends to each half of the local shard separately."""
    query, half = "bf16[1,2,4,8192,128]{4,3,2,1,0}", "bf16[1,2,4096,128]{3,2,1,0}"
    carried = HLO.replace("%while.37 = s32[] while", f"%while.37 = (s32[], {query}, {half}) while")
    assert carried != HLO
    trips = [loop.trips for loop in Program(carried, TileTrips(4, 1.5, 8192)).loops()]
    assert trips == [5, 3, 2, 1.5]


def test_a_traced_loop_needs_its_trips():
    with pytest.raises(ValueError, match=r"the loop %while\.37 has no constant number of trips; give tile_trips"):
        assert Program(HLO).cost


def test_a_loop_need_not_start_at_zero():
    started = HLO.replace("%tuple.68 = s32[] tuple(%copy.12,", "%tuple.68 = s32[] tuple(%constant.18,")
    assert started != HLO
    assert next(Program(started, TileTrips(1, 1, 8192)).loops()).trips == 5 - 3


def test_kernel_calls_are_counted_with_their_lengths():
    body = "%wide.region_0.2.sunk (p: ()) -> () {"
    cost = Program(HLO.replace(body, f"{body}\n{CALL}"), TileTrips(1, 1, 8192)).cost
    assert cost.calls == {KernelCall("ringattn_backward", 16384, 8192): 5}
    assert cost.cycles == Program(HLO, TileTrips(1, 1, 8192)).cost.cycles


def test_peaks_agree_with_the_clocks():
    clocks = {kind: CHIPS[kind].flops / flops / 1e9 for kind, flops in CYCLE_FLOPS.items()}
    expected = {
        "TPU v3": 0.94,
        "TPU v4": 1.05,
        "TPU v4 core": 1.05,
        "TPU v5 lite": 1.5,
        "TPU v5": 1.75,
        "TPU v6 lite": 1.75,
        "TPU7x": 2.2,
    }
    assert clocks == pytest.approx(expected, rel=0.01)
    assert set(CORES) < set(CYCLE_FLOPS)


@pytest.mark.parametrize(
    ("mask", "documents"), [(Mask(False), 1), (Mask(), 1), (Mask(window=(40, 0)), 1), (Mask(), 3)], ids=str
)
@pytest.mark.parametrize("by_keys", [False, True])
def test_tiles_are_counted_as_the_tokens_see_one_another(mask, documents, by_keys):
    ring, sizes = Ring(mask, "zigzag", 2, 96, documents), (16, 24)
    q, kv = ring.tokens(1), ring.tokens(0)
    counts = count_tiles(mask, q, kv, sizes, groups=3, by_keys=by_keys)
    pairs = np.asarray(visible(mask, q, kv))[0].reshape(96 // 16, 16, 96 // 24, 24).swapaxes(1, 2)
    any_visible, all_visible = pairs.any((2, 3)), pairs.all((2, 3))
    assert counts.steps == 3 * (4 if by_keys else 6)
    assert counts.full == 3 * all_visible.sum()
    assert counts.visited == 3 * any_visible.sum()
    assert counts.idle == (0 if by_keys else 3 * (~any_visible.any(1)).sum())


def test_searched_tiles_lie_between_visible_ones():
    positions = np.array([[0, 1, 100, 101, 2, 3, 102, 103]], np.int32)
    keys = Tokens(positions)
    counts = count_tiles(Mask(), Tokens(np.array([[2, 3]], np.int32)), keys, (2, 2), 1, by_keys=False)
    assert counts == TileCounts(steps=1, full=1, partial=1, searched=1)


def test_a_causal_zigzag_ring_does_half_of_the_work():
    members, local, tiling = 4, 256, Tiling((16, 32), groups=2)
    tilings = {"ringattn_forward": tiling, "ringattn_backward": tiling}
    counts = ring_counts(Ring(Mask(), "zigzag", members, local), tilings)
    forward = counts[KernelCall("ringattn_forward", local, local)]
    hop, half = (counts[KernelCall("ringattn_backward", local, keys)] for keys in (local, local // 2))
    every = 2 * (local // 16) * (local // 32)
    assert (hop.full, hop.partial) == (every / 2, 0)
    assert forward.visited * members == hop.visited * (members - 1) + 2 * half.visited
    assert forward.visited / every == pytest.approx(0.5, rel=0.05)


def test_a_window_needs_few_hops():
    tiling = Tiling((16, 16))
    ring = Ring(Mask(window=(20, 0)), "contiguous", 8, 64)
    assert list(ring.owners(3)) == [3, 2]
    counts = ring_counts(ring, {"ringattn_forward": tiling, "ringattn_backward": tiling})
    assert counts[KernelCall("ringattn_forward", 64, 64)].visited < 10


@pytest.fixture(scope="module")
def settings():
    return config.read(Path(__file__).parents[1] / "configs" / "benchmark_cycles.py", config.Benchmark)


def schedules(c: config.Benchmark) -> dict[KernelSpec, KernelSchedule | str]:
    own, splash = KernelSchedule(1431, 2315, 2388, 9), KernelSchedule(290, 1147, 1147, 0, 620)
    return {spec: own if spec.kernel == "ringattn" else splash for spec in kernel_rows.kernel_specs(c)}


def test_rows_compare_the_same_work(settings):
    rows = kernel_rows.kernel_rows(settings, "v5e:2x4", "TPU v5 lite", schedules(settings))
    cells = {(row["kernel"], row["mask"], row["head_dim"], row["direction"]): row for row in rows}
    assert len(cells) == len(rows) == 2 * 2 * (4 + 2 * 2)
    own, splash = (cells[kernel, "full", 128, "forward"] for kernel in ("ringattn", "splash"))
    length, heads = 8192, 32
    assert own["ideal"] == splash["ideal"] == 4 * heads * 128 * length**2 / 131_072
    tiles = 8 * (length // 256) * (length // 512)
    assert own["cycles"] == 8 * (length // 256) * 1431 + tiles * 2315
    assert splash["cycles"] == heads * (16 * 16 * (290 + 1147) + 16 * 620)
    assert own["splash"] == own["cycles"] / splash["cycles"]
    assert (own["partial"], cells["ringattn", "causal", 128, "forward"]["partial"]) == (None, 2388 / 2315)
    causal = cells["ringattn", "causal", 128, "forward"]
    assert causal["ideal"] == pytest.approx(own["ideal"] / 2, rel=1e-3)
    assert own["cycles"] / 2 < causal["cycles"] < own["cycles"]


def test_a_pair_of_tiles_takes_at_least_its_products(settings):
    forward, backward = (
        next(s for s in kernel_rows.kernel_specs(settings) if (s.kernel, s.direction) == ("ringattn", direction))
        for direction in ("forward", "backward")
    )
    tiling, call = Tiling((256, 512), groups=8), KernelCall("", 8192, 8192)
    assert attention_kernels.pair_cycles(forward, tiling, call, "TPU v5 lite") == 2048
    assert attention_kernels.pair_cycles(backward, tiling, call, "TPU v5 lite") == 5120


def test_two_cores_halve_the_cycles(settings):
    found = schedules(settings)
    one, two = (kernel_rows.kernel_rows(settings, "x:2x2", kind, found) for kind in ("TPU v5 lite", "TPU v5"))
    assert [row["cycles"] for row in one if row["kernel"] == "splash"] == [
        2 * row["cycles"] for row in two if row["kernel"] == "splash"
    ]


def test_a_failed_kernel_has_no_row(settings):
    found = {spec: "no" if spec.kernel == "splash" else each for spec, each in schedules(settings).items()}
    rows = kernel_rows.kernel_rows(settings, "v5e:2x4", "TPU v5 lite", found)
    assert {row["kernel"] for row in rows} == {"ringattn"}
    assert {row["splash"] for row in rows} == {None}


def test_the_report_is_complete(settings, tmp_path, capsys):
    rows = kernel_rows.kernel_rows(settings, "v5e:2x4", "TPU v5 lite", schedules(settings))
    programs = [
        cycles.program_row("v5e:2x4", "pass of ring zigzag", "TPU v5 lite", 131_072e6, 0.25e6, (1.0e6, 0.8e6)),
        cycles.program_row("v5e:8x8", "step, kernel='xla'", "TPU v5 lite", 131_072e6, 4e6, None),
    ]
    assert [row["utilisation"] for row in programs] == [0.8, 0.25]
    console = make_console()
    console.print(cycle_report.kernel_table(rows), cycle_report.program_table(programs))
    output = capsys.readouterr().out
    assert all(mask in output for mask in ("full", "causal", "window 1,024", "16 documents"))
    assert re.search(r"pass of ring zigzag .* 1\.56 ", output), "all / visible tiles"
    for part in ([], programs):
        cycle_report.plot(rows, part, tmp_path / "cycles.png")
        assert imread(tmp_path / "cycles.png").shape[2] == 4


@pytest.mark.skipif(find_spec("libtpu") is None, reason="needs the TPU compiler: pip install -e '.[tpu]'")
def test_kernels_compile_for_an_absent_tpu():
    shape = (True, None, False, 4, 2, 128, 1024, 1024, 512)
    own, splash = (
        KernelSpec("ringattn", "forward", *shape, "bfloat16"),
        KernelSpec("splash", "backward", *shape, "bfloat16"),
    )
    refused = replace(own, dtype="float16")
    found = dict(kernel_schedules("v5e:2x2", [own, splash, refused]))
    assert "float16" in str(found.pop(refused))
    compiled = {spec: schedule for spec, schedule in found.items() if isinstance(schedule, KernelSchedule)}
    assert list(compiled) == [own, splash], found
    assert all(100 < schedule.full <= schedule.partial < 10_000 for schedule in compiled.values())
    assert compiled[own].partial > compiled[own].full
    assert compiled[splash].ends > 0


def test_topologies_without_cycles_are_refused(tmp_path):
    c = config.Benchmark(topology="cpu:2", directory=str(tmp_path))
    with pytest.raises(ValueError, match="cycles are known for TPUs; use one such as v5e:2x4"):
        cycles.count_cycles(c, tmp_path)


def test_a_missing_compiler_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install -e '\.\[tpu\]'"):
        cycles.count_cycles(config.Benchmark(topology="v5e:2x4"), tmp_path)


def test_steps_need_a_topology():
    with pytest.raises(ValueError, match=r"steps=.* must be None without topology"):
        config.Benchmark(steps=("configs/quickstart.py v5e:2x2",))
    with pytest.raises(ValueError, match="each 'CONFIG TOPOLOGY', such as"):
        config.Benchmark(topology="v5e:2x4", steps=("configs/quickstart.py",))


@pytest.mark.slow
@pytest.mark.skipif(find_spec("libtpu") is None, reason="needs the TPU compiler: pip install -e '.[tpu]'")
def test_a_pass_of_a_ring_is_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(kernel_rows, "KERNELS", ())  # else it compiles all kernels of the table
    c = config.Benchmark(
        topology="v5e:2x2",
        directory=str(tmp_path),
        shard_tokens=(1024,),
        heads=4,
        kv_heads=2,
        head_dim=128,
        dtype="bfloat16",
        subjects=("ring zigzag", "dense"),
    )
    cycles.count_cycles(c, tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    (row,) = results["programs"]
    assert row["cycles"] == row["xla"] + row["kernels"]
    assert row["kernels"] > row["visible"] > 0
    assert results["skipped"] == ["dense: cycles are counted for 'ring' subjects, not for 'dense'"]
    assert (tmp_path / "plots" / "cycles.png").is_file()
