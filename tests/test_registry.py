"""The kernel that is chosen, and the reasons."""

from typing import Any

import jax
import pytest

from ringattn import choose_kernel
from ringattn.attn.choices import KERNELS
from ringattn.attn.kernels.cudnn import Cudnn
from ringattn.attn.kernels.pallas_tpu import PallasTpu
from ringattn.attn.kernels.protocol import Kernel
from ringattn.attn.kernels.registry import XLA_TILES
from ringattn.attn.kernels.xla import Xla
from ringattn.hardware import CHIPS, platform

SHAPE: dict[str, Any] = {"heads": 32, "kv_heads": 8, "head_dim": 128}
TPU, GPU = "TPU v5 lite", "NVIDIA H100 80GB HBM3"


@pytest.mark.parametrize(
    ("device_kind", "options", "name", "reason"),
    [
        (TPU, {}, "pallas", "one fused kernel for every mask"),
        (TPU, {"dtype": "float32"}, "pallas", "one fused kernel"),
        (TPU, {"dtype": "float64"}, "xla", "takes bfloat16 and float32, and the inputs are float64"),
        ("TPU v3", {}, "xla", "takes TPUs from v4, and this device is TPU v3"),
        (GPU, {}, "cudnn", "cuDNN for calls without masks"),
        (GPU, {"dtype": "float32"}, "xla", "cuDNN takes bfloat16, and the inputs are float32"),
        (GPU, {"head_dim": 256}, "xla", "the inputs have 256"),
        ("Tesla T4", {}, "xla", "8.0 or newer, and this device is Tesla T4"),
        ("cpu", {}, "xla", "would run in an interpreter"),
    ],
)
def test_auto(device_kind, options, name, reason):
    choice = choose_kernel(**SHAPE | options, device_kind=device_kind)
    assert choice.name == name
    assert reason in " ".join(choice.reasons)
    assert isinstance(choice.kernel, Kernel)


@pytest.mark.parametrize(
    ("kernel", "device_kind", "dtype", "message"),
    [
        (
            "pallas",
            GPU,
            "bfloat16",
            "kernel='pallas' takes TPUs from v4, and this device is NVIDIA H100 80GB HBM3; use kernel='auto'",
        ),
        ("pallas", TPU, "float64", "kernel='pallas' takes bfloat16 and float32, and the inputs are float64"),
        ("cudnn", TPU, "bfloat16", "kernel='cudnn' takes NVIDIA GPUs"),
        ("cudnn", GPU, "float32", "kernel='cudnn' takes bfloat16, and the inputs are float32"),
        ("flash", GPU, "bfloat16", "kernel='flash' must be one of 'auto', 'xla', 'pallas', 'cudnn'"),
    ],
)
def test_a_named_kernel_that_cannot_serve_is_an_error(kernel, device_kind, dtype, message):
    with pytest.raises(ValueError, match=message):
        choose_kernel(kernel, **SHAPE, dtype=dtype, device_kind=device_kind)


def test_a_named_kernel_is_used():
    for kernel in ("xla", "pallas"):
        assert choose_kernel(kernel, **SHAPE, device_kind="cpu").name == kernel
    assert choose_kernel("cudnn", **SHAPE, device_kind=GPU).kernel == Cudnn(fallback=None)
    assert choose_kernel(**SHAPE, device_kind=GPU).kernel == Cudnn(Xla(XLA_TILES["gpu"]))
    assert choose_kernel("xla", **SHAPE, device_kind=TPU).kernel == Xla(XLA_TILES["tpu"])


@pytest.mark.parametrize("shared", [1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 16, 32])
@pytest.mark.parametrize(
    ("head_dim", "dtype"), [(64, "bfloat16"), (64, "float32"), (128, "float32"), (256, "bfloat16"), (256, "float32")]
)
def test_tiles_of_pallas_fit_vmem(shared, head_dim, dtype):
    """Grid steps have a number of heads that divides those of a K/V head, and tiles of at most 16 MiB."""
    kernel = choose_kernel(heads=2 * shared, kv_heads=2, head_dim=head_dim, dtype=dtype, device_kind=TPU).kernel
    assert isinstance(kernel, PallasTpu)
    assert not kernel.interpret
    assert shared % kernel.heads == 0
    assert kernel.backward_tile is not None
    assert all(size % kernel.multiple == 0 for size in (*kernel.tile, *kernel.backward_tile))
    width = 4 if dtype == "float32" else 2
    head_dim = -(-head_dim // 128) * 128  # VMEM has rows of 128
    query, key = (kernel.heads * size * head_dim for size in (kernel.backward_tile[0], kernel.backward_tile[1]))
    slots = 3 * query * (2 * width + 4)  # query, d_out and d_query
    assert slots + key // kernel.heads * 2 * (2 * width + 2 * 4) <= 14 * 2**20


def test_pallas_is_refused_with_64_bit_types():
    with jax.enable_x64(True):
        choice = choose_kernel(**SHAPE, device_kind=TPU)
    assert choice.name == "xla"
    assert "jax_enable_x64 is set" in choice.reasons[0]


def test_every_chip_has_a_platform():
    assert {platform(kind) for kind in CHIPS} == {"tpu", "gpu"}
    assert platform("cpu") == "cpu"
    assert set(KERNELS) == {"auto", "xla", "pallas", "cudnn"}
