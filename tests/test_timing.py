"""The time of a step, from the text of a compiled program and the schedules of its kernels."""

import jax
import numpy as np
import pytest

from ringattn import config
from ringattn.attn.kernels.registry import choose_kernel
from ringattn.attn.kernels.xla import Xla
from ringattn.attn.mask import Mask
from ringattn.config.stages import with_values
from ringattn.cost.attention_kernels import (
    CallCycles,
    Heads,
    call_cycles,
    mean_counts,
    pallas_tilings,
    ring_kernels,
    step_rings,
    step_trips,
)
from ringattn.cost.cycles import CYCLE_FLOPS, KernelSchedule, TileCounts
from ringattn.cost.flops import useful_step_flops
from ringattn.cost.program import KernelCall
from ringattn.cost.visited import Ring, ring_counts
from ringattn.hardware import CHIPS
from ringattn.mesh.axes import AXES
from ringattn.planning.compile import prepare
from ringattn.planning.timing import KERNEL_UTILISATION, _kernels, analyse

KIND, LOCAL, L = "TPU v5 lite", 1024, 16_384
C = config.Config(
    model=config.Model(
        layers=2, dim=256, heads=4, kv_heads=2, head_dim=128, feed_forward=512, vocabulary=1024, dtype="bfloat16"
    ),
    data=config.Data(seq_len=4 * LOCAL),
    train=config.Train(batch_size=1, steps=10),
)


def program(keys: int) -> str:
    """Two layers; each calls the forward kernel four times, computes for 30,000 cycles and sends 45 MB in vain."""
    shapes = f"bf16[1,2,2,{LOCAL},128]{{4,3,2,1,0}}, bf16[1,2,{keys},128]{{3,2,1,0}}"
    kernel = f'custom_call_target="tpu_custom_call", operand_layout_constraints={{{shapes}}}'
    calls = "\n".join(f"  %ringattn_forward.{n} = (f32[8]) custom-call(%q), {kernel}" for n in range(4))
    return f"""
%body (p: ()) -> () {{
{calls}
  %dense = f32[8] fusion(%a), calls=%fused, backend_config={{"estimated_cycles":"30000"}}
  %sent = bf16[22500000] collective-permute(%b), source_target_pairs={{{{0,1}}}}
  ROOT %t = () tuple(%dense)
}}
%fused (p: ()) -> () {{
  ROOT %add = f32[8] add(%p, %p)
}}
%condition (p: ()) -> () {{
  %limit = s32[] constant(2)
  %index = s32[] get-tuple-element(%p), index=0
  ROOT %lt = pred[] compare(%index, %limit), direction=LT
}}
ENTRY %main (p: ()) -> () {{
  %zero = s32[] constant(0)
  %first = () tuple(%zero)
  ROOT %loop = () while(%first), condition=%condition, body=%body
}}
"""


@pytest.fixture(scope="module")
def mesh():
    pytest.importorskip("libtpu", reason="pip install -e '.[tpu]' for the TPU compiler")
    return prepare(C, "v5e:2x2").mesh


def test_kernels_count_by_their_tiles(mesh):
    (_, ring), heads = step_rings(C, mesh)[0], Heads(4, 2, 128, "bfloat16")
    schedules = {spec: KernelSchedule(1000, 3000, 3300) for spec in ring_kernels(ring, heads, segments=True)}
    time, (sent,) = analyse(program(LOCAL), C, mesh, schedules.items())
    counts = ring_counts(ring, pallas_tilings(next(iter(schedules)), KIND))
    call = KernelCall("ringattn_forward", LOCAL, LOCAL)
    per_cycle = CYCLE_FLOPS[KIND] / CHIPS[KIND].flops
    kernels = 2 * 4 * schedules[ring_kernels(ring, heads, segments=True)[0]].cycles(counts[call]) * per_cycle
    assert time is not None
    assert time.kernel_seconds == pytest.approx(kernels)
    assert time.compute_seconds == pytest.approx(kernels + 2 * 30_000 * per_cycle)
    assert (sent.count, sent.hidden) == (2, 0)
    assert time.exposed_seconds == pytest.approx(2e-3)
    assert time.seconds == pytest.approx(time.compute_seconds + 2e-3)
    assert time.utilisation == pytest.approx(useful_step_flops(C) / 4 / time.seconds / CHIPS[KIND].flops)
    assert time.tokens_per_day == pytest.approx(4 * LOCAL / time.seconds * 86_400)
    assert time.device_hours == pytest.approx(10 * 4 * time.seconds / 3600)
    assert time.device_hours_per_billion_tokens == pytest.approx(time.device_hours * 1e8 / (4 * LOCAL))
    two_rows, _ = analyse(program(LOCAL), with_values(C, {"train.batch_size": 2}), mesh, list(schedules.items()))
    assert two_rows is not None
    assert two_rows.kernel_seconds == pytest.approx(2 * kernels)


@pytest.mark.parametrize("separate", [True, False])
def test_kernels_have_segments_if_documents_are_separate(mesh, separate):
    specs = _kernels(with_values(C, {"data.separate_documents": separate}), mesh)
    assert [spec.segments for spec in specs] == [separate] * 2


def test_kernels_that_are_no_hops_take_their_share_of_attention(mesh):
    """A call over all keys, as of the strategy gather: its tiles are not counted."""
    time, _ = analyse(program(4 * LOCAL), C, mesh, [])
    model = C.model
    weights = model.layers * model.dim * (2 * (4 + 2) * 128 + 3 * 512) + 1024 * model.dim
    attention = (useful_step_flops(C) - 6 * weights * C.data.seq_len) / 3 / 4
    assert time is not None
    assert time.kernel_seconds == pytest.approx(attention / KERNEL_UTILISATION / CHIPS[KIND].flops)


def test_a_v4_chip_is_two_devices_of_half_its_speed(mesh):
    mesh = prepare(C, "v4:2x2x1").mesh
    whole = CHIPS["TPU v4"]
    time, (sent,) = analyse(program(4 * LOCAL), C, mesh, [])
    assert time is not None
    assert time.compute_seconds - time.kernel_seconds == pytest.approx(2 * 30_000 * CYCLE_FLOPS["TPU v4"] / whole.flops)
    assert time.utilisation == pytest.approx(useful_step_flops(C) / 8 / time.seconds / (whole.flops / 2))
    assert sent.link_seconds == pytest.approx(1e-3)


def test_a_kernel_without_a_schedule_is_named(mesh):
    _, ring = step_rings(C, mesh)[0]
    specs = ring_kernels(ring, Heads(4, 2, 128, "bfloat16"), segments=True)
    with pytest.raises(ValueError, match="ringattn_forward: out of VMEM"):
        analyse(program(LOCAL), C, mesh, [(spec, "out of VMEM") for spec in specs])


def test_counts_are_averaged_over_kinds_of_layers():
    call = KernelCall("ringattn_forward", 8, 8)
    full, window = {call: TileCounts(4, 12, 4)}, {call: TileCounts(4, 0, 2)}
    assert mean_counts([(1, full), (3, window)]) == {call: TileCounts(4, 3, 2.5)}
    spec = ring_kernels(Ring(Mask(), "zigzag", 4, 8), Heads(4, 2, 128, "bfloat16"), segments=True)[0]
    found = call_cycles(KIND, {spec: KernelSchedule(10, 10**6, 2 * 10**6)}, window)
    assert found == {call: CallCycles(40 + 4 * 10**6, 2 * 10**6)}


def test_tiles_of_a_strategy_that_is_not_chosen_yet_are_unknown():
    with pytest.raises(ValueError, match="must be one of ring, usp, gather, ulysses"):
        step_trips(with_values(C, {"attention.strategy": "auto"}), jax.make_mesh((1, 1, 8, 1), AXES), KIND)


@pytest.mark.parametrize("window", [None, 600])
@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
@pytest.mark.parametrize(
    ("strategy", "outer", "shards"),
    [("ring", 1, 8), ("ring", 2, 8), ("gather", 1, 1), ("ulysses", 1, 1), ("usp", 2, 2), ("usp", 4, 4)],
)
def test_all_tiles_are_counted_whatever_the_strategy(strategy, outer, shards, layout, window):
    """The trips of all calls of a device are the visible tiles of keys per tile of queries."""
    names = {"attention.strategy": strategy, "attention.layout": layout, "model.window": window}
    c = with_values(C, names | {"data.seq_len": L})
    mesh = jax.make_mesh((1, outer, 8 // outer, 1), AXES)
    options = {"heads": 4, "kv_heads": 2, "head_dim": 128, "dtype": "bfloat16"}
    kernel = choose_kernel("xla", **options, device_kind=KIND).kernel
    assert isinstance(kernel, Xla)
    q_size, kv_size = kernel.tile
    oldest = L if window is None else window
    first, keys = np.arange(0, L, q_size)[:, None], np.arange(0, L, kv_size)
    visible = (keys < first + q_size) & (keys + kv_size > first - oldest)
    full = (keys + kv_size <= first + 1) & (keys >= first + q_size - 1 - oldest)
    per_row = [np.sum(full) / len(first), np.sum(visible & ~full) / len(first)]
    calls = len(
        list(Ring(Mask() if window is None else Mask(window=(window, 0)), layout, shards, L // shards).owners(0))
    )
    *trips, keys = step_trips(c, mesh, KIND)
    assert [calls * each for each in trips] == pytest.approx(per_row)
    assert keys == L // shards
