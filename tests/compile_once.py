"""Compiles a program once per test module, where JAX would compile it again for every function that lowers to it.

Each `train` or `evaluate` traces its own functions, so JAX's caches do not know that two runs of a test module lower to
the same program. JAX's persistent cache would, but is wrong for programs of several CPU devices: see
`ringattn/compilation_cache.py`. This one keeps the loaded program itself and never writes or reads it.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
from jax._src import compiler

NAME = "backend_compile_and_load"


def reuse(compile_program: Callable[..., Any], programs: dict[tuple, Any]) -> Callable[..., Any]:
    """Returns `compile_program`, which returns the program in `programs` if it compiled an equal one before.

    Equal are the StableHLO without source locations, and the compiler's options, among them the devices in order.
    Programs with Python callbacks hold addresses of Python objects, and are compiled every time.
    """

    def compile_once(backend: Any, module: Any, devices: Any, options: Any, host_callbacks: Sequence[Any]) -> Any:
        text = module.operation.get_asm(enable_debug_info=False)
        if host_callbacks or "callback" in text:
            return compile_program(backend, module, devices, options, host_callbacks)
        key = id(backend), hashlib.sha256(text.encode()).digest(), options.SerializeAsString()
        if key not in programs:
            programs[key] = compile_program(backend, module, devices, options, host_callbacks)
        return programs[key]

    return compile_once


@contextmanager
def compiled_once() -> Iterator[dict[tuple, Any]]:
    """Reuses programs of JAX inside the context; yields them."""
    programs: dict[tuple, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, NAME, reuse(getattr(compiler, NAME), programs))
        yield programs
