"""Names of the strategies and of the kernels."""

from typing import Literal, get_args

Strategy = Literal["ring", "gather", "ulysses", "usp", "auto"]
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)
KernelName = Literal["auto", "xla", "pallas", "cudnn"]
KERNELS: tuple[KernelName, ...] = get_args(KernelName)
