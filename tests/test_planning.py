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

import jax
import pytest
from wire import executed

from ringattn import config, planning
from ringattn.cost.memory import program_memory
from ringattn.cost.minimum import minimum_memory
from ringattn.mesh.devices import ring_mesh
from ringattn.planning import compile as compile_module
from ringattn.planning.compile import abstract_step
from ringattn.planning.devices import devices_of
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


@pytest.mark.parametrize("remat", ["off", "on"])
def test_each_layer_of_the_compiled_step_rotates_kv_twice(remat):
    step = compiled(replace(SMALL, model=replace(SMALL.model, remat=remat)), devices=4)
    layers, hops = SMALL.model.layers, 3
    kv_sends = layers * hops * (2 + 2 + 2)  # K and V forward, again backward, and their gradients
    # Ids are equal for all layers, so JAX moves their first send out of the loop over layers.
    id_sends = layers * hops * 2 - (layers - 1)
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
    assert plan.parameter_bytes == planning.plan(c, "cpu:8").gradient_bytes
    assert set(plan.sent) <= {"all-reduce", "all-gather"}
    text = "\n".join(planning.report(plan))
    assert "a step of decoding with a cache of 4,096 tokens" in text
    assert text.endswith("it fits")
    with pytest.raises(ValueError, match="vocabulary=None must be"):
        planning.plan_decode(replace(c, model=replace(c.model, vocabulary=None)), "cpu:8")


def test_a_plan_counts_what_each_device_holds():
    c = replace(SMALL, mesh=config.Mesh(data=2, context=4), train=config.Train(batch_size=2))
    plan = planning.plan(c, "cpu:8")
    tables = 384 * 64
    layer = 64 * 16 * (4 + 2 + 2 + 4) + 3 * 64 * 128 + 2 * 64
    assert plan.parameters == tables + 3 * layer + 64
    replicated = 3 * 2 * 64 + 64  # the norms' scales
    assert plan.gradient_bytes == 4 * ((plan.parameters - replicated) / 8 + replicated)
    assert plan.state_bytes == 3 * plan.gradient_bytes + 2 * 4  # with two moments; the step and the count of optax
    assert plan.argument_bytes == plan.state_bytes + 5 * 4 * 256 / 4
    assert plan.temporary_bytes is not None
    needed = minimum_memory(c, plan.mesh)
    assert 0.9 * plan.state_bytes < needed.state < plan.state_bytes  # without norms and padding of the vocabulary
    assert needed.total < plan.argument_bytes + plan.temporary_bytes
    assert plan.refusal is None
    assert any("it fits" in line for line in planning.report(plan))


def test_a_plan_that_exceeds_this_machine_does_not_fit(monkeypatch):
    monkeypatch.setattr(compile_module, "host_memory", lambda: 3_000_000)
    model = config.Model(layers=1, dim=64, heads=1, kv_heads=1, head_dim=16, feed_forward=128, vocabulary=4096)
    plan = planning.plan(replace(SMALL, model=model, data=config.Data(seq_len=64)), "cpu:8")
    assert plan.memory_bytes == 375_000
    assert plan.temporary_bytes is not None
    needed, memory = bytes_in_words(8 * (plan.argument_bytes + plan.temporary_bytes)), "2.861 MiB"
    assert plan.refusal == f"8 devices need {needed}, but this machine has {memory}"
    assert list(planning.report(plan))[-1].endswith(f"it does not fit: {plan.refusal}")


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
        ((*LLAMA, "--topology", "h100:8"), "not GPUs; use one such as v5e:8x8, v5p:4x4x4 or cpu:8"),
        ((*LLAMA, "--topology", "v5e:3x7"), "use v5e:2x6"),
        ((*LLAMA, "--topology", "cpu:8", "--model.layers", "1000000000"), "reduce model.layers=1000000000"),
        ((*LLAMA, "--topology", "cpu:8", "--data.seq_len", "1024000000000000"), "reduce data.seq_len=1024000000000000"),
    ],
)
def test_mistakes_are_one_line(error_of, words, message):
    assert message in error_of(*words)


@pytest.mark.parametrize(
    ("topology", "fix"),
    [
        ("cpu", "must be cpu:N with N from 1 to 1024; use cpu:8"),
        ("cpu:0", "must be cpu:N with N from 1 to 1024; use cpu:8"),
        ("cpu:abc", "must be cpu:N with N from 1 to 1024; use cpu:8"),
        ("cpu:\u0663", "must be cpu:N with N from 1 to 1024; use cpu:8"),  # Arabic 3
        ("cpu:1000000", "must be cpu:N with N from 1 to 1024; use cpu:8"),
        ("gpu:8", "use one such as v5e:8x8, v5p:4x4x4 or cpu:8"),
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
    words += ["--data.seq_len", "512", "--json", str(tmp_path / "plan.json")]
    done = subprocess.run([sys.executable, "scripts/plan.py", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert f"{plan['parameters']:,} parameters" in done.stdout
    assert plan["mesh"] == {"data": 1, "context_outer": 1, "context": 8, "tensor": 1}
    assert plan["temporary_bytes"] > 0
