"""strategy="auto": the law of overlap, by example, and that what it picks runs."""

from typing import Any

import jax
import numpy as np
import pytest

from ringattn import Mask, attention, choose_strategy
from ringattn.hardware import CHIPS

LLAMA: dict[str, Any] = {"heads": 32, "kv_heads": 8, "head_dim": 128, "device_kind": "TPU v5"}


def tokens(local: int) -> dict[str, Any]:
    return LLAMA | {"queries": local, "keys": local}


def test_long_shards_hide_their_transfers_in_a_ring():
    strategy, reasons = choose_strategy(64, **tokens(16_384))
    assert strategy == "ring"
    # 0.7 * 459e12 / 90e9 * (8 / 32) * 1.2 = 1,071
    assert (
        "TPU v5 at 70% of 459 TFLOP/s, 90 GB/s a link, 32 heads on 8: a hop hides its transfer from 1,071" in reasons[0]
    )
    assert "there are 16,384" in reasons[1]


@pytest.mark.parametrize(
    ("change", "least"),
    [
        ({"layout": "zigzag"}, 2142),
        ({"dtype": "float32"}, 2142),
        ({"kv_heads": 32}, 4284),
        ({"mask": Mask(causal=False), "layout": "zigzag"}, 1071),
        ({"device_kind": "TPU v5 lite"}, 919.3),
    ],
)
def test_the_law(change, least):
    assert choose_strategy(16, **{**tokens(int(least) + 1), **change}).strategy == "ring"
    below = choose_strategy(16, **{**tokens(int(least) - 1), **change})
    assert f"from {least:,.0f} local queries on" in below.reasons[0]
    assert "a ring waits" in below.reasons[1]


def test_short_shards_exchange_heads_where_they_can():
    strategy, reasons = choose_strategy(8, **tokens(256))
    assert strategy == "ulysses"
    assert "ulysses can split 8 K/V heads over 8 devices" in reasons
    assert reasons[-1].startswith("microseconds waited for in a forward pass: ring ")


def test_short_shards_are_gathered_where_heads_do_not_split():
    strategy, reasons = choose_strategy(64, **tokens(256))
    assert strategy == "gather"
    assert "ulysses cannot split 8 K/V heads over 64 devices" in reasons


def test_what_does_not_fit_is_not_gathered():
    strategy, reasons = choose_strategy(4096, **tokens(1000))
    assert strategy == "ring"
    assert any("gathered K/V and their gradients take too much memory, 46.9 GiB of 95" in reason for reason in reasons)


def test_a_pair_of_axes_may_exchange_inside():
    strategy, reasons = choose_strategy((8, 4), **tokens(512))
    assert strategy == "usp"
    assert "usp can split 8 K/V heads over 4 devices" in reasons
    assert choose_strategy((8, 4), **tokens(8192)).strategy == "ring"


def test_only_a_ring_leaves_out_what_a_window_does_not_reach():
    choice = choose_strategy(8, **tokens(256), mask=Mask(window=(300, 0)))
    assert choice == ("ring", ("the mask needs 2 of 7 hops, and only a ring leaves out the others",))


@pytest.mark.parametrize(("shards", "reason"), [(1, "one device"), (8, "nothing is known of 'cpu'")])
def test_without_knowledge_it_is_the_ring(shards, reason):
    strategy, reasons = choose_strategy(shards, **{**tokens(64), "device_kind": "cpu"})
    assert strategy == "ring"
    assert reason in reasons[0]


def test_attention_runs_what_was_chosen(make_mesh, monkeypatch):
    x = np.random.default_rng(0).standard_normal((1, 64, 8, 16)).astype(np.float32)
    with jax.set_mesh(mesh := make_mesh(context=8)):
        x = jax.device_put(x, jax.NamedSharding(mesh, jax.P(None, "context")))

        def runs(strategy: str) -> str:
            return str(jax.make_jaxpr(lambda x: attention(x, x, x, strategy=strategy))(x))

        assert runs("auto") == runs("ring")
        monkeypatch.setitem(CHIPS, "cpu", CHIPS["TPU v5"])
        jax.clear_caches()
        assert runs("auto") == runs("ulysses") != runs("ring")
