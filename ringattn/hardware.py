"""What chips can do. No arrays.

Dense bf16 FLOP/s without sparsity, per device as JAX counts them, from the makers' data sheets:
https://cloud.google.com/tpu/docs/system-architecture-tpu-vm and https://www.nvidia.com/en-us/data-center/.
"""

PEAK_FLOPS: dict[str, float] = {
    "TPU v3": 61.5e12,  # half a chip: JAX sees its two cores
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "Tesla T4": 65e12,  # float16: it has no native bf16
}
"""By `device_kind`; a chip that is not here has no known peak."""
