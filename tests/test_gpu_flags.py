"""Flags for GPUs are added only with an NVIDIA driver, never override the user's, and are known to XLA."""

import os
import subprocess
import sys

import pytest

from ringattn.attn import ring
from ringattn.attn.kernels.protocol import KVGrads
from ringattn.mesh import gpu_flags

FRACTION = "XLA_PYTHON_CLIENT_MEM_FRACTION"


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """Pretends that there is an NVIDIA driver."""
    monkeypatch.setattr(gpu_flags, "NVIDIA_DRIVERS", (tmp_path,))
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=somewhere")
    monkeypatch.setenv(FRACTION, "")
    monkeypatch.delenv(FRACTION)


def test_flags_are_added_and_shown(driver, capsys):
    added = gpu_flags.add_gpu_flags()
    assert len(added) == len(gpu_flags.GPU_FLAGS)
    assert os.environ["XLA_FLAGS"].split() == ["--xla_dump_to=somewhere", *added]
    assert os.environ[FRACTION] == str(gpu_flags.MEMORY_FRACTION)
    assert " ".join(added) in capsys.readouterr().err
    assert gpu_flags.add_gpu_flags() == ()
    assert capsys.readouterr().err == ""


def test_the_users_values_are_kept(driver, monkeypatch):
    mine = "--xla_gpu_enable_latency_hiding_scheduler=false"
    monkeypatch.setenv("XLA_FLAGS", mine)
    monkeypatch.setenv(FRACTION, "0.5")
    (other,) = gpu_flags.add_gpu_flags()
    assert os.environ["XLA_FLAGS"] == f"{mine} {other}"
    assert os.environ[FRACTION] == "0.5"


def test_nothing_is_added_without_a_gpu(driver, monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert gpu_flags.add_gpu_flags() == ()
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setattr(gpu_flags, "NVIDIA_DRIVERS", (tmp_path / "absent",))
    assert gpu_flags.add_gpu_flags() == ()
    assert os.environ["XLA_FLAGS"] == "--xla_dump_to=somewhere"


def test_xla_knows_the_flags():
    """XLA ends a process with an unknown flag."""
    flags = " ".join(f"{name}={value}" for name, value in gpu_flags.GPU_FLAGS.items())
    code = "import jax; print(jax.devices())"
    environ = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", code], env=environ, check=True, capture_output=True)


def test_all_arrays_of_a_hop_are_sent_at_the_same_time():
    """A shard without its owner and its static runs, and the gradients of another one."""
    arrays = len(ring._Shard._fields) - 2 + len(KVGrads._fields)
    assert gpu_flags.compiler_options()["xla_gpu_experimental_parallel_collective_overlap_limit"] >= arrays == 7
