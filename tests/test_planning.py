"""Plans: memory and transfers of the compiled training step, and the script that reports them."""

import importlib
import importlib.util
import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
from matplotlib.image import imread
from wire import executed

from ringattn import config, planning
from ringattn.cost.memory import program_memory
from ringattn.cost.minimum import minimum_memory
from ringattn.mesh.devices import ring_mesh
from ringattn.planning import command as command_module
from ringattn.planning import compile as compile_module
from ringattn.planning import memory as memory_module
from ringattn.planning.choice import plan_open
from ringattn.planning.compile import Compiled, Target, abstract_step, compile_plan
from ringattn.planning.devices import devices_of
from ringattn.planning.schedule import Collective
from ringattn.planning.timing import StepTime
from ringattn.training.stage import prepare_stage
from ringattn.units import bytes_in_words

ROOT = Path(__file__).parents[1]
SMALL = config.Config(
    model=config.Model(layers=3, dim=64, heads=4, kv_heads=2, head_dim=16, feed_forward=128, vocabulary=300),
    data=config.Data(seq_len=256),
    train=config.Train(batch_size=1),
)


def compiled(c, devices=1):
    mesh = ring_mesh(devices)
    with jax.set_mesh(mesh):
        state, batch, step = abstract_step(c, mesh)
        return step.lower(state, batch).compile()


@pytest.mark.parametrize("separate", [True, False], ids=["separate", "joined"])
@pytest.mark.parametrize("remat", ["off", "on"])
def test_each_layer_of_the_compiled_step_rotates_kv_twice(remat, separate):
    data = replace(SMALL.data, separate_documents=separate)
    step = compiled(replace(SMALL, model=replace(SMALL.model, remat=remat), data=data), devices=4)
    layers, hops = SMALL.model.layers, 3
    kv_sends = layers * hops * (2 + 2 + 2)  # K and V forward, again backward, and their gradients
    # Ids are equal for all layers, so JAX moves their first send out of the loop over layers.
    id_sends = separate * (layers * hops * 2 - (layers - 1))
    assert executed(step.as_text(), "collective-permute") == kv_sends + id_sends


def test_memory_with_a_large_vocabulary_and_a_long_row():
    """Four layers of model dim 512, 128k ids, 16,384 tokens. The logits of a whole row would take 8 GiB."""
    model = config.Model(
        layers=4, dim=512, heads=8, kv_heads=4, head_dim=64, feed_forward=1536, vocabulary=131_072, remat="on"
    )
    for tied in (True, False):
        c = replace(SMALL, model=replace(model, tied=tied), data=config.Data(seq_len=16_384))
        memory = program_memory(compiled(c))
        assert memory is not None
        assert memory.temporaries < 2 * 2**30
        assert minimum_memory(c, ring_mesh(1).shape).total < memory.total


def test_a_plan_of_decoding_counts_cache_and_parameters():
    mesh, train = config.Mesh(data=2, context=4), config.Train(batch_size=2)
    c = replace(SMALL, mesh=mesh, train=train, data=config.Data(seq_len=4096))
    plan = planning.plan_decode(c, "cpu:8")
    layers, kv_heads, head_dim = c.model.layers, c.model.kv_heads, c.model.head_dim
    keys_and_values = 2 * 2 * layers * kv_heads * head_dim * 4096 // 4  # bfloat16; one row per data shard
    assert plan.cache_bytes == keys_and_values + 2 * 4  # the length of the row, and the offset
    assert plan.parameter_bytes == planning.plan(c, "cpu:8").device_bytes.gradients
    assert set(plan.sent) <= {"all-reduce", "all-gather"}
    text = "\n".join(planning.report(plan))
    assert "a step of decoding with a cache of 4,096 tokens" in text
    assert text.endswith("it fits")
    with pytest.raises(ValueError, match="vocabulary=None must be"):
        planning.plan_decode(replace(c, model=replace(c.model, vocabulary=None)), "cpu:8")


@pytest.mark.parametrize(("separate", "arrays"), [(True, 5), (False, 4)])
def test_the_abstract_batch_has_the_arrays_of_a_batch(separate, arrays):
    c, mesh = replace(SMALL, data=replace(SMALL.data, separate_documents=separate)), ring_mesh(2)
    with jax.set_mesh(mesh):
        batch, run = abstract_step(c, mesh)[1], prepare_stage(c, mesh)
    real = run.place(run.training.batch(0))
    assert len(jax.tree.leaves(batch)) == arrays
    assert jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), batch) == jax.tree.map(
        lambda x: (x.shape, x.dtype, x.sharding), real
    )


def test_a_plan_counts_what_each_device_holds():
    c = replace(SMALL, mesh=config.Mesh(data=2, context=4), train=config.Train(batch_size=2))
    plan = planning.plan(c, "cpu:8")
    tables = 384 * 64
    layer = 64 * 16 * (4 + 2 + 2 + 4) + 3 * 64 * 128 + 2 * 64
    assert plan.parameters == tables + 3 * layer + 64
    replicated = 3 * 2 * 64 + 64  # the norms' scales
    device = plan.device_bytes
    assert device.gradients == device.parameters == 4 * ((plan.parameters - replicated) / 8 + replicated)
    assert device.optimizer == 2 * device.parameters + 2 * 4  # two moments; the step and the count of optax
    assert device.batch == 5 * 4 * 256 / 4
    needed = minimum_memory(c, plan.mesh)
    state = device.parameters + device.optimizer
    assert 0.9 * state < needed.state < state  # without norms and padding of the vocabulary
    assert device.peak is not None
    assert needed.total < device.peak == sum(device.parts.values())
    assert (plan.fits, plan.refusal, plan.changes) == (True, None, [])
    assert "it fits" in list(planning.report(plan))[-1]
    assert (plan.host_bytes, plan.host_limit, plan.time) == (0, None, None)
    text = "\n".join(planning.report(plan))
    assert "time per step: unknown, because the speed of cpu is unknown" in text
    hops = [each for each in plan.collectives if each.part.startswith("ring") and "f32" in each.array]
    kv = 1 * 2 * 16 * 64 * 4  # rows, K/V heads, head dim, local tokens, float32
    assert {each.bytes for each in hops} == {kv}
    layers, ring = c.model.layers, 4
    sums = {part: sum(each.count for each in hops if each.part == part) for part in ("ring forward", "ring backward")}
    assert sums == {"ring forward": layers * (ring - 1) * 2, "ring backward": layers * (ring - 1) * 4}
    assert {each.hidden for each in hops} == {0.0}, "the CPU compiler splits no collectives"


def test_saved_activations_are_what_a_layer_adds_to_the_peak():
    """Two more layers add their state, their gradients and what they save; temporaries stay the same."""
    found = {}
    for remat, layers in (("on", 2), ("on", 4), ("off", 2)):
        c = replace(SMALL, model=replace(SMALL.model, remat=remat, layers=layers), data=config.Data(seq_len=2048))
        found[remat, layers] = compile_plan(c, Target("cpu:1", ring_mesh(1), None)).device_bytes
    two, four = found["on", 2], found["on", 4]
    assert (two.saved, four.saved) == tuple(layers * 2048 * (64 * 4 + 4 * 16 * 4 + 4 * 4) for layers in (2, 4))
    assert found["off", 2].saved > 3 * two.saved, "read from the compiled loop"
    assert two.temporaries is not None
    assert four.temporaries == pytest.approx(two.temporaries, abs=0.2 * two.saved)


def test_a_plan_that_exceeds_this_machine_does_not_fit(monkeypatch):
    monkeypatch.setattr(memory_module, "host_memory", lambda: 3_000_000)
    model = config.Model(layers=1, dim=64, heads=1, kv_heads=1, head_dim=16, feed_forward=128, vocabulary=4096)
    plan = planning.plan(replace(SMALL, model=model, data=config.Data(seq_len=64)), "cpu:8")
    assert plan.device_bytes.limit == 375_000
    assert plan.device_bytes.peak is not None
    needed, memory = bytes_in_words(8 * plan.device_bytes.peak), "2.861 MiB"
    assert plan.refusal == f"8 devices need {needed}, but this machine has {memory}"
    lines = list(planning.report(plan))
    assert any(line.endswith(f"it does not fit: {plan.refusal}") for line in lines)
    start = lines.index("to make it fit, by estimated effect (--changes True compiles each):")
    assert lines[start + 1 :] == ["  --data.seq_len 32: about 80 bytes less"], "the gradient exceeds the activations"


@pytest.mark.parametrize(
    ("error", "reason", "size"),
    [
        (
            "RESOURCE_EXHAUSTED: the total memory for HLO temporaries (15.86G) exceeds available HBM (15.75G).",
            "temporaries (15.86G) exceeds",
            15.86,
        ),
        (
            "RESOURCE_EXHAUSTED: Ran out.\nUsed 19.93G of 15.75G hbm. Exceeded hbm capacity by 4.18G.\n",
            "Used 19.93G of 15.75G hbm",
            19.93,
        ),
        ("RESOURCE_EXHAUSTED: Used 208.00G of 128.00G host. Exceeded host capacity", "208.00G of 128.00G host", None),
    ],
)
def test_the_compilers_figure_is_read_from_its_error(error, reason, size):
    found, needed = memory_module.refused_bytes(error)
    assert reason in found
    assert needed == (None if size is None else int(size * 2**30))


def test_host_memory_counts():
    device = SimpleNamespace(platform="tpu", device_kind="TPU v5")
    needed = memory_module.DeviceBytes(80, 90, 10, 20, 0, 10, 5, 35, 0)
    against = memory_module.reason_against
    assert against(device, 4, needed, 100, 112) is None
    assert "100 bytes of its host, which has 90 bytes" in (against(device, 4, needed, 100, 90) or "")
    assert "a device needs 80 bytes, but has 70" in (against(device, 4, replace(needed, limit=70), 0, None) or "")


@pytest.fixture
def error_of(monkeypatch, capsys):
    """error_of(*words): the error message of scripts/plan.py, after checking that it is one line with status 2."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    main = importlib.import_module("plan").main

    def run(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["plan.py", *words])
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code == 2
        output = capsys.readouterr()
        assert not output.out, "found before compiling"
        (line,) = output.err.splitlines()
        assert line.startswith("error: ")
        return line

    return run


LLAMA = ("--config", str(ROOT / "configs/llama3_8b_1m.py"))
STAGED = ("--config", str(ROOT / "configs/staged.py"))
QUICKSTART = ("--config", str(ROOT / "configs/quickstart.py"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (LLAMA, "--topology v5e:8x8"),
        ((*QUICKSTART, "--topology", "cpu:8"), "--model.vocabulary 32000"),
        ((*LLAMA, "--data.seq_len", "4097", "--topology", "cpu:8"), "data.seq_len"),
        ((*LLAMA, "--topology"), "--topology needs a value: a string"),
        ((*LLAMA, "--topolgy", "cpu:8"), "--topolgy"),
        ((*STAGED, "--topology", "cpu:8"), "has 3 stages, but a plan covers one; choose one, such as --stage 2"),
        ((*STAGED, "--topology", "cpu:8", "--stage", "4"), "--stage 4 must be from 1 to 3"),
        ((*LLAMA, "--topology", "cpu:8", "--json", "none/x"), "directory none does not exist; create it first"),
        ((*LLAMA, "--topology", "cpu:8", "--json", "/dev"), "--json /dev is a directory; use a file name"),
        (
            (*LLAMA, "--topology", "h100:0"),
            "must be h100:N or h100:HOSTSxN with at most 1024 GPUs; use h100:8 or h100:2x8",
        ),
        ((*LLAMA, "--topology", "v5e:3x7"), "use v5e:2x6"),
        ((*LLAMA, "--topology", "cpu:8", "--mesh.context", "16"), "does not fit 8 devices; use --mesh.context 8\n"),
        ((*LLAMA, "--topology", "cpu:8", "--sweep", "chip"), "--sweep chip must be one of 'chips'"),
        ((*LLAMA, "--topology", "cpu:8", "--sweep", "chips", "--decode", "True"), "leave out --decode True"),
        ((*LLAMA, "--topology", "cpu:8", "--model.layers", "1000000000"), "reduce model.layers=1000000000"),
        ((*LLAMA, "--topology", "cpu:8", "--data.seq_len", "1024000000000000"), "reduce data.seq_len=1024000000000000"),
    ],
)
def test_mistakes_are_one_line(error_of, words, message):
    assert message in error_of(*words) + "\n"


@pytest.mark.parametrize(
    ("topology", "fix"),
    [
        ("cpu", "must be cpu:N with N from 1 to 1024; use cpu:8"),
        ("cpu:0", "must be cpu:N with N from 1 to 1024; use cpu:8"),
        ("cpu:abc", "must be cpu:N with N from 1 to 1024; use cpu:8"),
        ("cpu:\u0663", "must be cpu:N with N from 1 to 1024; use cpu:8"),  # Arabic 3
        ("cpu:1000000", "must be cpu:N with N from 1 to 1024; use cpu:8"),
        ("gpu:8", "use one such as v5e:8x8, v5p:4x4x4, h100:8 or cpu:8"),
        ("h10:8", "did you mean h100:8?"),
        ("h100:2x8x8", "use h100:8 or h100:2x8"),
        ("h100:64x64", "use h100:8 or h100:2x8"),
        ("tpu7:2x2x1", "did you mean tpu7x:4x4x4?"),
        ("V5E:2x2", "did you mean v5e:4x4?"),
        ("v5e", "must be v5e:AxB, with sides in chips; use v5e:4x4"),
        ("v5e:64", "must be v5e:AxB, with sides in chips; use v5e:4x4"),
        ("v5e:0x4", "must be v5e:AxB, with sides in chips; use v5e:4x4"),
        ("v5e:8x8x8", "must be v5e:AxB, with sides in chips; use v5e:4x4"),
        ("v5p:4x4", "must be v5p:AxBxC, with sides in chips; use v5p:4x4x4"),
        ("v5e:3x5", "use v5e:2x4"),
        ("v5e:1x4", "use v5e:2x4"),
        ("v5e:1x256", "use v5e:4x4"),
        ("v5p:3x4x5", "use v5p:2x4x5"),
        ("v5e:32x32", "has 1,024 chips, more than a pod of 256; use one such as v5e:4x4"),
    ],
)
def test_impossible_topologies_have_a_fix(topology, fix):
    with pytest.raises(ValueError, match=rf"^--topology {topology}[: ].*{re.escape(fix)}$"):
        planning.plan(SMALL, topology)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="no TPU compiler: pip install -e '.[tpu]'")
@pytest.mark.parametrize("topology", ["v5e:2x4", "v5e:1x1", "v5p:2x4x5", "v6e:4x4", "tpu7x:4x4x4"])
def test_possible_topologies(topology):
    name, _, size = topology.partition(":")
    assert len(devices_of(topology)) == math.prod(map(int, size.split("x"))) * (1 + (name == "tpu7x"))


def test_the_script_writes_its_report_as_json(tmp_path):
    words = ["--config", "configs/quickstart.py", "--topology", "cpu:8", "--model.vocabulary", "257"]
    words += ["--data.seq_len", "512", "--json", str(tmp_path / "plan.json"), "--log.directory", str(tmp_path)]
    done = subprocess.run([sys.executable, "scripts/plan.py", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert f"{plan['parameters']:,} parameters" in done.stdout
    assert plan["mesh"] == {"data": 1, "context_outer": 1, "context": 8, "tensor": 1}
    assert plan["fits"] is True
    assert plan["device_bytes"]["peak"] > plan["device_bytes"]["temporaries"] > 0
    assert {"device_bytes", "host_bytes", "step_seconds", "utilisation", "max_context"} < set(plan)
    assert {"op", "bytes", "count", "hidden"} < set(plan["collectives"][0])
    directory = tmp_path / "quickstart/plan"
    assert json.loads((directory / "plan.json").read_text()) == plan
    assert "| ring backward, f32" in (directory / "report.md").read_text()
    assert imread(directory / "plots/memory.png").shape[2] == 4


def test_an_unwritable_report_is_one_line_before_compiling(tmp_path, error_of, monkeypatch):
    monkeypatch.setattr(command_module, "Cache", None)
    (tmp_path / "file").touch()
    words = (*LLAMA, "--topology", "cpu:8", "--log.directory", str(tmp_path / "file"))
    assert "use another --log.directory" in error_of(*words)


def test_pictures_and_tables_of_a_ring(tmp_path):
    """A plan with times, as for a TPU."""
    hops = [
        Collective("collective-permute", part, "bf16[8]", 2**20, 14, True, 1e-3, 3e-3, exposed, 1 - 1e3 * exposed)
        for part, exposed in (("ring forward", 0.0), ("ring backward", 4e-4))
    ]
    other = Collective("all-gather", "forward", "bf16[8]", 2**20, 2, False, 1e-3, 0.0, 1e-3, 0.0)
    time = StepTime("cycles", 2.0, 1.9, 1.5, 0.3, 0.02, 0.1, 0.5, 1e9, 100.0, 10.0)
    c = replace(SMALL, data=config.Data(seq_len=512))
    plan = replace(planning.plan(c, "cpu:8"), collectives=[*hops, other], time=time)
    text = "\n".join(planning.report(plan))
    assert re.search(r"ring backward, bf16\[8\] +14 MiB +14 +14.00 +5.60 +60 %", text)
    assert re.search(r"forward, all-gather +2 MiB +2 +2.00 +2.00 +0 %", text)
    assert re.search(r"utilisation \(MFU\) +50.0 %", text)
    planning.write_report(plan, tmp_path)
    assert imread(tmp_path / "plots/ring.png").shape[2] == 4
    assert "![a hop of the ring, forward and backward](plots/ring.png)" in (tmp_path / "report.md").read_text()


def test_cudnn_is_refused_for_separate_documents():
    c = replace(SMALL, attention=replace(SMALL.attention, kernel="cudnn"))
    with pytest.raises(ValueError, match=r"cannot keep documents separate; .*, or --data.separate_documents False$"):
        planning.plan(c, "cpu:8")


def test_a_kernel_that_cannot_train_on_the_devices_is_refused():
    c = replace(SMALL, attention=replace(SMALL.attention, kernel="pallas"))
    with pytest.raises(ValueError, match=r"attention.kernel='pallas' trains on TPUs only"):
        planning.plan(c, "cpu:8")
    auto = replace(c, attention=replace(c.attention, strategy="auto"))
    with pytest.raises(ValueError, match=r"attention.kernel='pallas' trains on TPUs only"):
        plan_open(auto, "cpu:8", lambda *_: pytest.fail("the step was compiled"), print)


def test_the_report_of_a_step_that_the_compiler_refuses(tmp_path, monkeypatch):
    refused = Compiled(None, "5 GiB exceed 4 GiB", 5 * 2**30)
    step = compile_module.compile_step
    monkeypatch.setattr(compile_module, "compile_step", lambda c, target: (refused, *step(c, target)[1:]))
    plan = planning.plan(SMALL, "cpu:8")
    assert (plan.fits, plan.device_bytes.peak, plan.device_bytes.temporaries) == (False, 5 * 2**30, None)
    planning.write_report(plan, tmp_path)
    assert "it does not fit: 5 GiB exceed 4 GiB" in (tmp_path / "report.md").read_text()
    assert (tmp_path / "plots/memory.png").is_file()
