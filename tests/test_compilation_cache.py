"""Programs of several CPU devices are neither written to JAX's persistent compilation cache nor loaded from it."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from conftest import jax_options
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import AbstractDevice

import ringattn.attn.sharded
from ringattn import attention, config, shard_attention
from ringattn.compilation_cache import disable_for_cpus
from ringattn.mesh.devices import start
from ringattn.runs.metrics import read_rows

ROOT = Path(__file__).parents[1]


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Path]:
    """The directory of an enabled compilation cache that accepts every program."""
    options = {
        "jax_enable_compilation_cache": True,
        "jax_compilation_cache_dir": str(tmp_path / "cache"),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    (tmp_path / "cache").mkdir()
    with jax_options(**options):
        compilation_cache.reset_cache()
        yield tmp_path / "cache"
    compilation_cache.reset_cache()


def loaded_programs(mesh: jax.sharding.Mesh) -> int:
    """Compiles attention anew; returns how many programs came from the cache. Executing one could hang."""
    hits = []

    def count(event: str, **_: object) -> None:
        hits.extend([event] * (event == "/jax/compilation_cache/cache_hits"))

    jax.clear_caches()
    jax.monitoring.register_event_listener(count)
    with jax.set_mesh(mesh):
        jax.jit(attention).lower(*[sharded(mesh)] * 3).compile()
    jax.monitoring.unregister_event_listener(count)
    return len(hits)


def sharded(mesh: jax.sharding.Mesh) -> jax.ShapeDtypeStruct:
    sharding = jax.NamedSharding(mesh, jax.P(None, "context"))
    return jax.ShapeDtypeStruct((1, 8 * mesh.size, 1, 8), jnp.float32, sharding=sharding)


def test_attention_on_cpu_devices_is_neither_loaded_nor_written(cache, make_mesh, monkeypatch, caplog):
    with monkeypatch.context() as earlier_version:
        earlier_version.setattr(ringattn.attn.sharded, "disable_for_cpus", lambda mesh: None)
        loaded_programs(make_mesh(context=2))
        entries = set(cache.iterdir())
        assert entries
        assert loaded_programs(make_mesh(context=2)) == 1  # otherwise the next line would prove nothing
    assert loaded_programs(make_mesh(context=2)) == 0
    loaded_programs(make_mesh(context=4))
    assert set(cache.iterdir()) == entries
    (record,) = [record for record in caplog.records if record.name == "ringattn.compilation_cache"]
    assert record.getMessage().startswith("the persistent compilation cache is disabled: XLA would execute")


def test_shard_attention_on_cpu_devices_disables_the_cache(cache, make_mesh):
    mesh, spec = make_mesh(context=2), jax.P(None, "context")
    program = jax.shard_map(shard_attention, mesh=mesh, in_specs=spec, out_specs=spec)
    jax.jit(program).lower(*[sharded(mesh)] * 3)
    assert not jax.config.values["jax_enable_compilation_cache"]


def test_a_started_mesh_of_cpu_devices_disables_the_cache(cache):
    start(config.Mesh())
    jax.jit(lambda x: x + 1).lower(1.0).compile()
    assert not list(cache.iterdir())


def test_one_cpu_device_keeps_the_cache(cache, make_mesh, caplog):
    assert loaded_programs(make_mesh()) == 0
    assert loaded_programs(make_mesh()) == 1
    assert not caplog.records


@pytest.mark.parametrize("kind", ["NVIDIA H100 80GB HBM3", "TPU v5"])
def test_accelerators_keep_the_cache(cache, make_mesh, kind):
    device = AbstractDevice(device_kind=kind, num_cores=None, platform="gpu" if "NVIDIA" in kind else "tpu")
    disable_for_cpus(make_mesh(context=8).abstract_mesh.update(abstract_device=device))
    assert jax.config.values["jax_enable_compilation_cache"]


def test_the_tests_use_no_cache():
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ
    assert jax.config.values["jax_compilation_cache_dir"] is None


def test_xla_still_loses_the_order_of_collectives():
    """Fails once XLA keeps the order of collectives of a loaded program; `xla_cpu_order.py` describes the defect."""
    command = [sys.executable, str(ROOT / "tests" / "xla_cpu_order.py"), "--order"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode != 2, f"no execution graph in XLA's log: {done.stdout}{done.stderr}"
    assert done.returncode == 1, f"XLA is mended: delete ringattn/compilation_cache.py. {done.stdout}{done.stderr}"


CONFIG = """
from ringattn.config import Config, Data, Log, Mesh, Model, Optimizer, Train, Validation

config = Config(
    model=Model(layers=1, dim=16, heads=2, kv_heads=2, head_dim=8, feed_forward=32),
    data=Data(path={text!r}, seq_len=256, validation=0.3),
    mesh=Mesh(context=4, simulate=4),
    optimizer=Optimizer(warmup_steps=2),
    train=Train(steps=6, batch_size=2),
    validation=Validation(every=3, batches=2),
    log=Log(every=1, directory={runs!r}),
)
"""


@pytest.mark.slow
def test_a_cache_does_not_change_training(tmp_path):
    """Starts with a cache give the losses of a start without, bit for bit, and leave the cache empty."""
    path, runs, cache = tmp_path / "ring.py", tmp_path / "runs", tmp_path / "cache"
    path.write_text(CONFIG.format(text=str(ROOT / "ringattn" / "attn"), runs=str(runs)))
    environ = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    environ |= {"PYTHONPATH": str(ROOT), "JAX_DISABLE_MOST_OPTIMIZATIONS": "true"}
    cached = environ | {"JAX_COMPILATION_CACHE_DIR": str(cache)}
    thresholds = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}

    def losses(name: str, variables: dict[str, str]) -> list[tuple]:
        command = [sys.executable, str(ROOT / "scripts" / "train.py"), "--config", str(path), "--name", name]
        done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stderr.count("compilation cache is disabled") == ("JAX_COMPILATION_CACHE_DIR" in variables)
        rows = read_rows(runs / name / "metrics.jsonl")
        return [(row["step"], row.get("loss"), row.get("grad_norm"), row.get("eval/loss")) for row in rows]

    uncached = losses("uncached", environ)
    assert len(uncached) >= 6
    for number, variables in enumerate((cached | thresholds, cached)):
        assert losses(str(number), variables) == uncached
    assert not cache.exists() or not list(cache.iterdir())
