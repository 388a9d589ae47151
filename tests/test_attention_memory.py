"""Memory of attention per device, as reported by the compiler, and the law that is fitted to it."""

import numpy as np
import pytest

from ringattn.visualize import MemoryLaw, Shape, attention_bytes, attention_memory, fit_memory, growth, memory_curves

SMALL = Shape(heads=4, kv_heads=2, head_dim=32, dtype="float32")


def test_a_gather_holds_all_keys_and_a_ring_does_not():
    length = 8 * 2048
    gather, ring = (attention_bytes(strategy, length, 8, shape=SMALL) for strategy in ("gather", "ring"))
    keys = length * SMALL.kv_heads * SMALL.head_dim * 4
    assert 2 * keys / 8 < ring < 4 * keys <= gather, "keys, values and the gradients of both, of the whole row"


def test_dense_attention_holds_the_logits_of_all_pairs():
    short, long = (attention_bytes("dense", length, 8, shape=SMALL) for length in (2048, 4096))
    assert long >= 2 * 4 * 4 * 4096**2, "logits and their gradients, or weights, of four heads"
    assert growth({2048: short, 4096: long}) == pytest.approx(4, rel=0.05)


@pytest.mark.parametrize(("strategy", "devices"), [("dense", 1), ("gather", 8), ("ring", 8)])
def test_the_total_adds_arguments_and_results(strategy, devices):
    """Query, key, value, output, and a gradient of each, for the device's own tokens."""
    temporaries, total = (attention_bytes(strategy, 2048, devices, shape=SMALL, total=add) for add in (False, True))
    arrays = 2048 // devices * 4 * (SMALL.heads + SMALL.kv_heads) * SMALL.head_dim * 4
    assert arrays <= total - temporaries < arrays + 100, "and a few pointers"


def test_a_program_larger_than_memory_is_planned():
    assert attention_bytes("dense", attention_memory.max_dense_length(), 1) > 2**39


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"devices": 9}, "a ring of 9 does not fit 8 devices"),
        ({"length": 100}, "112"),
        ({"strategy": "x"}, "'x'"),
        ({"strategy": "dense", "length": 2**16}, "length=65536 must be at most 32768 .* 32 heads"),
    ],
)
def test_a_program_that_cannot_be_compiled_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        attention_bytes(**({"strategy": "ring", "length": 128, "devices": 8} | wrong))


def test_curves_are_of_dense_gather_and_ring(monkeypatch):
    calls = []
    monkeypatch.setattr(attention_memory, "attention_bytes", lambda *args: calls.append(args) or len(calls))
    longer = 2 * attention_memory.max_dense_length(SMALL)
    assert memory_curves([16, longer], 8, "striped", SMALL) == {
        "dense": {16: 1},
        "gather": {16: 2, longer: 3},
        "ring": {16: 4, longer: 5},
    }
    assert calls[-1] == ("ring", longer, 8, "striped", SMALL)


def test_a_fit_recovers_the_law():
    law = MemoryLaw(per_local_token=5.0, per_token=3.0)
    fitted = fit_memory({devices: 1000 * (5 + 3 * devices) for devices in (2, 4, 8)}, 1000)
    np.testing.assert_allclose(fitted, law)
    length = law.reach(2**30, 4)
    assert length / 4 * law.per_local_token + length * law.per_token == pytest.approx(2**30)
    flat = fit_memory({2: 7001, 4: 7000, 8: 6999}, 1000)
    assert flat.per_token == 0, "noise, by which memory would shrink with the devices"
    assert flat.reach(1.0, 64) == pytest.approx(8 * flat.reach(1.0, 8))


@pytest.mark.parametrize("power", [0, 1, 2])
def test_growth_gives_the_power(power):
    assert growth({x: 3 * x**power for x in (4, 16, 64)}) == pytest.approx(2**power)
