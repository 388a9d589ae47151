"""Hidden and exposed transfers, from schedules written by hand and from a compiled one."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from ringattn.cost.program import Op, Program
from ringattn.cost.roofline import Roofline, arrays
from ringattn.planning.links import Links
from ringattn.planning.schedule import Collective, Timeline

CHIPS = [SimpleNamespace(device_kind="TPU v5 lite", platform="tpu", coords=[x, y]) for x, y in ((0, 0), (0, 1))]
CHIPS += [SimpleNamespace(device_kind="TPU v5 lite", platform="tpu", coords=[x, y]) for x, y in ((1, 1), (1, 0))]
GPUS = [SimpleNamespace(device_kind="NVIDIA H100 80GB HBM3", platform="gpu", process_index=n // 2) for n in range(4)]
PAIRS = "source_target_pairs={{0,1},{1,2},{2,3},{3,0}}"
FORWARD = 'metadata={op_name="jit(f)/jvp()/ppermute"}'
BACKWARD = 'metadata={op_name="jit(f)/transpose(jvp())/ppermute"}'
SUM = 'metadata={op_name="jit(f)/transpose(jvp())/psum"}'
BYTES = 45_000_000
"""1 ms on the link of a v5e."""
HALF = f"bf16[{BYTES // 2}]"
HOP = f"""
%body (p: ()) -> () {{
  %k.start = ({HALF}, {HALF}, u32[]) collective-permute-start(%a), {PAIRS}, {FORWARD}
  %v.start = ({HALF}, {HALF}, u32[]) collective-permute-start(%b), {PAIRS}, {BACKWARD}
  %attention = f32[8] fusion(%a), calls=%fused, backend_config={{"estimated_cycles":"CYCLES"}}
  %k = bf16[{BYTES // 2}] collective-permute-done(%k.start)
  %v = bf16[{BYTES // 2}] collective-permute-done(%v.start)
  ROOT %t = () tuple(%k, %v)
}}
%fused (p: ()) -> () {{
  ROOT %add = f32[8] add(%p, %p)
}}
%condition (p: ()) -> () {{
  %limit = s32[] constant(7)
  %index = s32[] get-tuple-element(%p), index=0
  ROOT %lt = pred[] compare(%index, %limit), direction=LT
}}
ENTRY %main (p: ()) -> () {{
  %zero = s32[] constant(0)
  %first = () tuple(%zero)
  %loop = () while(%first), condition=%condition, body=%body
  %sum = f32[{BYTES // 4}] all-reduce(%g), replica_groups={{{{0,1,2,3}}}}, {SUM}
  ROOT %end = () tuple(%loop)
}}
"""


def run(text: str, devices=CHIPS) -> tuple[Timeline, list[Collective]]:
    """A millisecond is a thousand cycles."""
    timeline = Timeline(Program(text), lambda computation, op: 1e-6 * (op.cycles or 0), Links(devices))
    return timeline, timeline.collectives()


@pytest.mark.parametrize(
    ("cycles", "k", "v"), [(2000, 1, 1), (5000, 1, 1), (1500, 1, 0.5), (1000, 1, 0), (250, 0.25, 0), (0, 0, 0)]
)
def test_compute_hides_the_transfers_of_a_hop_up_to_its_own_time(cycles, k, v):
    timeline, (first, second, total) = run(HOP.replace("CYCLES", str(cycles)))
    assert [first.hidden, second.hidden, total.hidden] == pytest.approx([k, v, 0])
    assert (first.part, second.part, total.part) == ("ring forward", "ring backward", "backward")
    assert first.count == second.count == 7, "the trips of the loop"
    assert first.bytes == BYTES
    assert first.link_seconds == pytest.approx(1e-3)
    assert first.compute_seconds == pytest.approx(1e-6 * cycles)
    assert (total.op, total.bytes, total.count, total.is_asynchronous) == ("all-reduce", 1.5 * BYTES, 1, False)
    exposed = 7e-3 * (2 - k - v) + 0.75e-3  # an all-reduce uses both directions of the link
    assert timeline.compute == pytest.approx(7e-6 * cycles)
    assert timeline.seconds - timeline.compute == pytest.approx(exposed)


def test_the_transfer_that_is_awaited_first_is_served_first():
    gather = "%g.start = (bf16[{0}], bf16[{1}]) all-gather-start(%x), replica_groups={{{{0,1,2,3}}}}"
    lines = HOP.replace("CYCLES", "4000").splitlines()
    at = next(index for index, line in enumerate(lines) if "%attention" in line)
    lines[at:at] = [
        "  " + gather.format(BYTES // 8, BYTES // 2),
        '  %some = f32[8] fusion(%a), calls=%fused, backend_config={"estimated_cycles":"375"}',
        f"  %g = bf16[{BYTES // 2}] all-gather-done(%g.start)",
    ]
    _, (gathered, first, second, _) = run("\n".join(lines))
    assert gathered.link_seconds == pytest.approx(0.375e-3)
    assert (gathered.hidden, first.hidden, second.hidden) == pytest.approx((1, 1, 1))


def test_transfers_that_the_tpu_compiler_runs_together_with_compute():
    """An asynchronous collective is a fusion that starts it, fusions with a step of it, and one that ends it."""
    inside = f"  ROOT %g = bf16[{BYTES // 2}] all-gather(%p), replica_groups=[1,4]<=[4], dimensions={{0}}"
    names = ("begin", "async_collective_fusion.1", "end")
    text = "".join(f"%{name} (p: ()) -> () {{\n{inside}\n}}\n" for name in names)
    text += f"""
ENTRY %main (p: ()) -> () {{
  %async-collective-start.3 = (bf16[8], bf16[{BYTES // 2}]) fusion(%a), calls=%begin
  %step = (f32[8]) fusion(%b), calls=%async_collective_fusion.1, backend_config={{"estimated_cycles":"150"}}
  %async-collective-done.3 = bf16[{BYTES // 2}] fusion(%step), calls=%end
  %scattered = f32[{BYTES // 16}] fusion(%c), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %t = () tuple(%step)
}}
%all-reduce-scatter.1 (p: ()) -> () {{
  %r = f32[{BYTES // 4}] all-reduce(%p), replica_groups={{{{0,1,2,3}}}}
  ROOT %slice = f32[{BYTES // 16}] dynamic-slice(%r, %i)
}}
"""
    _, (gathered, scattered) = run(text)
    assert (gathered.op, gathered.is_asynchronous, gathered.bytes) == ("all-gather", True, 0.75 * BYTES)
    assert gathered.hidden == pytest.approx(0.4)
    assert (scattered.op, scattered.is_asynchronous, scattered.bytes) == ("reduce-scatter", False, 0.75 * BYTES)


def op(shape: str, kind: str, rest: str) -> Op:
    return Op("x", shape, kind, rest, False)


def test_links_of_tpus():
    links = Links(CHIPS)
    assert links.sent("collective-permute", op("bf16[1000]", "collective-permute", PAIRS)) == (2000, 2000 / 45e9)
    far = op("bf16[1000]", "collective-permute", "source_target_pairs={{0,2}}")
    assert links.sent("collective-permute", far).seconds == 2 * 2000 / 45e9
    groups = "replica_groups={{0,1},{2,3}}"
    assert links.sent("all-gather", op("bf16[1000]", "all-gather", groups)) == (1000, 1000 / 90e9)
    assert links.sent("reduce-scatter", op("bf16[500]", "reduce-scatter", groups)) == (1000, 1000 / 90e9)
    assert links.sent("all-reduce", op("bf16[1000]", "all-reduce", groups)) == (2000, 2000 / 90e9)
    assert links.sent("all-to-all", op("bf16[1000]", "all-to-all", "replica_groups=[1,4]<=[4]")).bytes == 1500


def test_links_of_gpus_on_one_host_and_on_two():
    links = Links(GPUS)
    near = op("(bf16[1000], bf16[1000])", "collective-permute", "source_target_pairs={{0,1},{1,0}}")
    assert links.sent("collective-permute", near) == (2000, 2000 / 450e9)
    far = op("(bf16[1000], bf16[1000])", "collective-permute", PAIRS)
    assert links.sent("collective-permute", far) == (2000, 2000 / 50e9)
    started = op("((bf16[250], bf16[250]), (bf16[500], bf16[500]))", "all-gather", "replica_groups={{0,1},{2,3}}")
    assert links.sent("all-gather", started) == (1000, 1000 / 450e9)
    across = op("bf16[1000]", "all-gather", "replica_groups={{0,1,2,3}}")
    assert links.sent("all-gather", across) == (1500, 1500 / 50e9)


def test_without_times_nothing_is_hidden():
    timeline = Timeline(Program(HOP.replace("CYCLES", "5")), None, Links(CHIPS))
    assert {each.hidden for each in timeline.collectives()} == {0.0}
    assert {each.exposed_seconds for each in timeline.collectives()} == {None}


def test_shapes_and_traffic_of_ops():
    assert [array.size for array in arrays("(bf16[2,3]{1,0:T(8,128)(2,1)S(1)}, f32[], pred[4]{0}, s4[8])")] == [
        12,
        4,
        4,
        4,
    ]
    assert [array.bytes for array in arrays("(bf16[2,3]{1,0:T(8,128)(2,1)S(1)}, f32[6]{0:S(5)}, pred[4])")] == [0, 0, 4]
    program = Program("""
%fused (p: ()) -> () {
  %stack = f32[32,100] parameter(0)
  %i = s32[] parameter(1)
  %row = f32[1,100] dynamic-slice(%stack, %i, %i)
  ROOT %b = f32[100] bitcast(%row)
}
ENTRY %main (p: ()) -> () {
  %a = bf16[4,8] parameter(0)
  %b = bf16[8,16] parameter(1)
  %c = f32[4,16] dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %s = f32[32,100] parameter(2)
  %i = s32[] parameter(3)
  ROOT %row = f32[100] fusion(%s, %i), kind=kLoop, calls=%fused
}
""")
    found = {each.name: Roofline(program).traffic("main", each) for each in program.computations["main"]}
    assert found["c"] == (2 * 4 * 8 * 16, 2 * (4 * 8 + 8 * 16) + 4 * 4 * 16)
    assert found["row"] == (0, 4 * 100 + 4 * 100 + 4), "the result, a row of the stack, and the index"
    assert found["a"] == (0, 0)


def test_copies_to_and_from_the_host_have_links_of_their_own():
    """As the TPU compiler writes them: 2 ms for each copy, beside 1 ms of each permute and 3.5 ms of compute."""
    piece, stack = "bf16[1,16000000]{1,0:T(8,128)}", "bf16[4,16000000]{1,0:T(8,128)S(5)}"
    starts = f"""
  %out.start = (({stack}, {piece}, s32[]), {stack}, u32[]{{:S(2)}}) dynamic-update-slice-start(%s, %x, %i), {FORWARD}
  %in.start = (({stack}, s32[]), {piece}, u32[]{{:S(2)}}) dynamic-slice-start(%s, %i), {BACKWARD}
  %saved.start = ({stack}, {piece}, u32[]) copy-start(%n), {BACKWARD}
  %near.start = (f32[8]{{0:S(1)}}, f32[8], u32[]) copy-start(%o)
  %attention"""
    names = {"out": "dynamic-update-slice", "in": "dynamic-slice", "saved": "copy", "near": "copy"}
    dones = "".join(f"\n  %{name} = {piece} {kind}-done(%{name}.start)" for name, kind in names.items())
    text = (
        HOP.replace("CYCLES", "3500").replace("\n  %attention", starts).replace("\n  ROOT %t", f"{dones}\n  ROOT %t", 1)
    )
    on_gpu = text.replace("dynamic-slice-start(", "fusion-start(").replace("%in.start", "%dynamic-slice-start.4")
    (same,) = [each for each in run(on_gpu, GPUS)[1] if each.op == "copy from host"]
    assert (same.bytes, same.hidden, same.link_seconds) == (32_000_000, 1, 0.5e-3)
    in_vmem = run(text.replace(piece, piece.replace("T(8,128)", "T(8,128)S(1)")))[1]
    assert in_vmem == [replace(each, array=new.array) for each, new in zip(run(text)[1], in_vmem, strict=True)]
    (late,) = [
        each
        for each in run(text.replace("  %in = ", "  %other = ").replace("(%in.start)", "(%x)"))[1]
        if each.op == "copy from host"
    ]
    assert (late.is_asynchronous, late.hidden) == (False, 0)
    timeline, found = run(text)
    copies = [each for each in found if each.op.startswith("copy")]
    assert [(each.op, each.part) for each in copies] == [
        ("copy to host", "forward"),
        ("copy from host", "backward"),
        ("copy to host", "backward"),
    ]
    assert [each.hidden for each in found] == pytest.approx([1, 1, 1, 1, 0.75, 0])
    assert {(each.bytes, each.count, each.link_seconds) for each in copies} == {(32_000_000, 7, 2e-3)}
    assert timeline.seconds - timeline.compute == pytest.approx(7 * 0.5e-3 + 0.75e-3)


@pytest.mark.parametrize(
    ("mask", "window", "pairs"),
    [("NO_MASK", 0, 64 * 64), ("CAUSAL", 0, 64 * 65 // 2), ("CAUSAL", 10, 10 * 11 // 2 + 54 * 10)],
)
def test_attention_of_cudnn_counts_visible_pairs(mask, window, pairs):
    options = f'backend_config={{"mask_type": "{mask}", "sliding_window_length": {window}}}'
    program = Program(f"""
ENTRY %main (p: ()) -> () {{
  %q = bf16[3,8,64,16] parameter(0)
  %k = bf16[3,2,64,16] parameter(1)
  %v = bf16[3,2,64,16] parameter(2)
  %f = bf16[3,8,64,16] custom-call(%q, %k, %v), custom_call_target="__cudnn$fmhaSoftmax", {options}
  ROOT %b = bf16[3,8,64,16] custom-call(%q, %k, %v), custom_call_target="__cudnn$fmhaSoftmaxBackward", {options}
}}
""")
    found = {each.name: Roofline(program).traffic("main", each).flops for each in program.computations["main"]}
    forward = 2 * 2 * 3 * 8 * pairs * 16
    assert (found["f"], found["b"]) == (forward, 2.5 * forward)
