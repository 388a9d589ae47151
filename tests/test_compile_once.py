"""Programs that the tests of a module share: equal in every respect that changes a result."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compile_once import compiled_once

X = np.arange(8, dtype=np.float32)


def double(factor=2.0):
    """Returns a new function, which JAX traces and lowers anew."""

    def program(x):
        return factor * x

    return program


@pytest.fixture
def programs():
    with compiled_once() as programs:
        yield programs


def test_equal_programs_are_compiled_once(programs):
    for _ in range(2):
        np.testing.assert_array_equal(jax.jit(double())(X), 2 * X)
        assert len(programs) == 1
    np.testing.assert_array_equal(jax.jit(double(3.0))(X), 3 * X)
    assert len(programs) == 2


def test_devices_their_order_and_options_are_part_of_a_program(programs):
    """A program for other devices, for other shards of them or of other optimizations is another one."""
    devices = jax.devices()
    for order in (devices[:4], devices[4:], devices[3::-1], devices[:2]):
        mesh = jax.make_mesh((len(order),), ("context",), devices=order)
        result = jax.jit(double())(jax.device_put(X, jax.NamedSharding(mesh, jax.P("context"))))
        np.testing.assert_array_equal(result, 2 * X)
        assert [shard.device for shard in result.addressable_shards] == order
    before = len(programs)
    jax.jit(double()).lower(X).compile()
    jax.jit(double()).lower(X).compile({"xla_llvm_disable_expensive_passes": False})
    assert len(programs) == before + 2


def test_programs_with_callbacks_are_compiled_every_time(programs):
    """They hold the address of a Python function."""
    for number in range(2):
        seen = []
        jax.jit(lambda x, seen=seen: jax.debug.callback(seen.append, x[0]))(X + np.float32(number))
        jax.effects_barrier()
        assert [float(value) for value in seen] == [number]


def test_a_donated_argument_is_part_of_a_program(programs):
    for donated in ((), (0,)):
        x = jnp.asarray(X) + np.float32(0)
        jax.jit(double(), donate_argnums=donated)(x)
        assert x.is_deleted() == bool(donated)
