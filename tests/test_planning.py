"""Plans: memory and transfers of the compiled training step, and the script that reports them."""

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import pytest
from wire import executed

from ringattn import config, planning
from ringattn.cost.memory import program_memory
from ringattn.mesh.devices import ring_mesh
from ringattn.planning.compile import abstract_step

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


def test_a_plan_counts_what_each_device_holds():
    plan = planning.plan(replace(SMALL, mesh=config.Mesh(data=2, context=4), train=config.Train(batch_size=2)), "cpu:8")
    tables = 384 * 64
    layer = 64 * 16 * (4 + 2 + 2 + 4) + 3 * 64 * 128 + 2 * 64
    assert plan.parameters == tables + 3 * layer + 64
    replicated = 3 * 2 * 64 + 64  # the norms' scales
    assert plan.gradient_bytes == 4 * ((plan.parameters - replicated) / 8 + replicated)
    assert plan.state_bytes == 3 * plan.gradient_bytes + 3 * 4  # with two moments; the step and two counts of optax
    assert plan.argument_bytes == plan.state_bytes + 5 * 4 * 256 / 4
    assert plan.temporary_bytes is not None
    assert plan.refusal is None
    assert any("it fits" in line for line in planning.report(plan))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config", "configs/llama3_8b_1m.py"], "--topology v5e:8x8"),
        (["--config", "configs/quickstart.py", "--topology", "cpu:8"], "--model.vocabulary 32000"),
        (["--config", "configs/llama3_8b_1m.py", "--data.seq_len", "4097", "--topology", "cpu:8"], "data.seq_len"),
        (["--config", "configs/llama3_8b_1m.py", "--topology"], "--topology needs a value: a string"),
        (["--config", "configs/llama3_8b_1m.py", "--topolgy", "cpu:8"], "--topolgy"),
        (
            ["--config", "configs/staged.py", "--topology", "cpu:8"],
            "has 3 stages, but a plan covers one; choose one, such as --stage 2",
        ),
        (["--config", "configs/staged.py", "--topology", "cpu:8", "--stage", "4"], "--stage 4 must be from 1 to 3"),
        (
            ["--config", "configs/quickstart.py", "--topology", "cpu:8", "--json", "none/x"],
            "directory none does not exist; create it first",
        ),
        (["--config", "configs/llama3_8b_1m.py", "--topology", "v5e:3x7"], "v5e:3x7"),
    ],
)
def test_mistakes_are_one_line(words, message):
    if "v5e" in words[-1] and importlib.util.find_spec("libtpu") is None:
        pytest.skip("no TPU compiler: pip install -e '.[tpu]'")
    done = subprocess.run([sys.executable, "scripts/plan.py", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_the_script_writes_its_report_as_json(tmp_path):
    words = ["--config", "configs/quickstart.py", "--topology", "cpu:8", "--model.vocabulary", "257"]
    words += ["--data.seq_len", "512", "--json", str(tmp_path / "plan.json")]
    done = subprocess.run([sys.executable, "scripts/plan.py", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert f"{plan['parameters']:,} parameters" in done.stdout
    assert plan["mesh"] == {"data": 1, "context_outer": 1, "context": 8, "tensor": 1}
    assert plan["temporary_bytes"] > 0
