"""GPUs that are not present: their targets, and a program that the GPU compiler compiles for them."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from ringattn.cost.flops import attention_flops, document_pairs
from ringattn.hardware import CHIPS, HOST_LINKS, HOST_MEMORY, NETWORKS
from ringattn.planning import gpus

ROOT = Path(__file__).parents[1]
HAS_COMPILER = any(importlib.util.find_spec(name) for name in gpus.PLUGINS)


def test_targets_agree_with_the_speeds():
    for gpu in gpus.GPUS.values():
        chip = CHIPS[gpu.name]
        assert gpu.memory_bandwidth == pytest.approx(chip.memory_bandwidth, rel=0.05)
        assert gpu.memory == pytest.approx(chip.memory, rel=0.1)
        assert gpu.name in HOST_MEMORY
        assert gpu.name in NETWORKS
        assert gpu.name in HOST_LINKS
        assert f"device_memory_size: {gpu.memory}" in gpu.target()


@pytest.mark.skipif(HAS_COMPILER, reason="the GPU compiler is installed")
def test_a_missing_compiler_is_one_line_with_the_command():
    with pytest.raises(ValueError, match=r"^--topology h100:8 needs the GPU compiler, on Linux; pip install -e "):
        gpus.gpu_devices("h100:8")


@pytest.mark.skipif(not HAS_COMPILER, reason="no GPU compiler: pip install -e '.[gpu-compiler]'")
def test_the_ring_of_a_small_step_is_hidden_on_two_hosts():
    """In another process, because the tests' own JAX has started without the GPU compiler."""
    code = """
from dataclasses import replace
from pathlib import Path
from ringattn import config, planning
c = config.read(Path("configs/llama3_8b_1m.py"))
c = replace(c, model=replace(c.model, layers=2, vocabulary=1024), data=replace(c.data, seq_len=4 * 16384))
for separate in (True, False):
    plan = planning.plan(replace(c, data=replace(c.data, separate_documents=separate)), "h100:2x2")
    hops = [each for each in plan.collectives if each.part.startswith("ring") and "128]" in each.array]
    time, asynchronous = plan.time, all(each.is_asynchronous for each in hops)
    print(plan.fits, plan.device_bytes.peak, time.seconds, len(hops), asynchronous, time.kernel_seconds)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    times = []
    for line in done.stdout.splitlines()[-2:]:
        fits, peak, seconds, hops, asynchronous, in_kernels = line.split()
        assert (fits, asynchronous) == ("True", "True")
        assert 2**30 < int(peak) < 2**34
        assert 0.05 < float(seconds) < 10
        assert int(hops) >= 10
        times.append((float(seconds), float(in_kernels)))
    (separate, without), (joined, in_cudnn) = times
    assert without == 0, "the kernel xla consists of ops of XLA"
    # cuDNN computes exactly the visible pairs of a device: forward, and 2.5 times that backward.
    visible = 2 * 3.5 * attention_flops(32, 128, document_pairs(4 * 16384, None)) / 4
    assert in_cudnn * CHIPS["NVIDIA H100 80GB HBM3"].flops == pytest.approx(visible, rel=1e-4)
    assert joined < separate / 2
