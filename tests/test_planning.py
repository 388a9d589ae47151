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
from ringattn.mesh import ring
from ringattn.planning.compile import abstract_step

ROOT = Path(__file__).parents[1]
SMALL = config.Config(
    model=config.Model(layers=3, dim=64, heads=4, kv_heads=2, head_dim=16, feed_forward=128, vocabulary=300),
    data=config.Data(seq_len=256),
    train=config.Train(batch_size=1),
)


def compiled(c, devices=1):
    mesh = ring(devices)
    with jax.set_mesh(mesh):
        state, batch, step = abstract_step(c, mesh)
        return step.lower(state, batch).compile()


@pytest.mark.parametrize("remat", ["off", "on"])
def test_in_the_compiled_step_each_layer_turns_kv_twice(remat):
    step = compiled(replace(SMALL, model=replace(SMALL.model, remat=remat)), devices=4)
    layers, hops = SMALL.model.layers, 3
    of_kv = layers * hops * (2 + 2 + 2)  # K and V forward, again backward, and their gradients
    of_ids = layers * hops * 2 - (layers - 1)  # equal for all layers: JAX takes their first departure out of the loop
    assert executed(step.as_text(), "collective-permute") == of_kv + of_ids


def test_memory_of_a_large_vocabulary_and_a_long_row():
    """Four layers of 512, 128k ids, 16,384 tokens: the logits alone would be 8 GiB."""
    model = config.Model(
        layers=4, dim=512, heads=8, kv_heads=4, head_dim=64, feed_forward=1536, vocabulary=131_072, remat="on"
    )
    for tied in (True, False):
        c = replace(SMALL, model=replace(model, tied=tied), data=config.Data(seq_len=16_384))
        found = compiled(c).memory_analysis()
        assert found is not None
        assert found.temp_size_in_bytes < 2 * 2**30


def test_a_plan_counts_what_each_device_holds():
    found = planning.plan(
        replace(SMALL, mesh=config.Mesh(data=2, context=4), train=config.Train(batch_size=2)), "cpu:8"
    )
    tables = 384 * 64
    layer = 64 * 16 * (4 + 2 + 2 + 4) + 3 * 64 * 128 + 2 * 64
    assert found.parameters == tables + 3 * layer + 64
    whole = 3 * 2 * 64 + 64  # the norms' scales lie on every device
    assert found.gradient_bytes == 4 * ((found.parameters - whole) / 8 + whole)
    assert found.state_bytes == 3 * found.gradient_bytes + 3 * 4  # two moments; the step, and two counts of optax
    assert found.argument_bytes == found.state_bytes + 5 * 4 * 256 / 4
    assert found.temporary_bytes is not None
    assert found.refusal is None
    assert any("it fits" in line for line in planning.report(found))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config", "configs/llama3_8b_1m.py"], "--topology v5e:8x8"),
        (["--config", "configs/quickstart.py", "--topology", "cpu:8"], "--model.vocabulary 32000"),
        (["--config", "configs/llama3_8b_1m.py", "--data.seq_len", "4097", "--topology", "cpu:8"], "data.seq_len"),
        (["--config", "configs/llama3_8b_1m.py", "--topology"], "expected one argument"),
        (["--config", "configs/llama3_8b_1m.py", "--topolgy", "cpu:8"], "--topolgy"),
        (["--config", "configs/staged.py", "--topology", "cpu:8"], "has 3: say which, such as --stage 2"),
        (["--config", "configs/staged.py", "--topology", "cpu:8", "--stage", "4"], "are 1 to 3"),
        (["--config", "configs/quickstart.py", "--topology", "cpu:8", "--json", "none/x"], "no folder none"),
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


def test_the_script_writes_what_it_says(tmp_path):
    words = ["--config", "configs/quickstart.py", "--topology", "cpu:8", "--model.vocabulary", "257"]
    words += ["--data.seq_len", "512", "--json", str(tmp_path / "plan.json")]
    done = subprocess.run([sys.executable, "scripts/plan.py", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "plan.json").read_text())
    assert f"{found['parameters']:,} parameters" in done.stdout
    assert found["mesh"] == {"data": 1, "context_outer": 1, "context": 8, "tensor": 1}
    assert found["temporary_bytes"] > 0
