"""strategy="auto": the law of overlap, by example, and that what it picks runs."""

from typing import Any

import jax
import numpy as np
import pytest

from ringattn import Mask, attention, choose_strategy
from ringattn.attention.auto import least_queries
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
    even = int(least) // 2 * 2  # so that it can lie in zigzag
    assert "nothing is waited for" in choose_strategy(16, **{**tokens(even + 2), **change}).reasons[1]
    below = choose_strategy(16, **{**tokens(even - 2), **change})
    assert f"from {least:,.0f} local queries on" in below.reasons[0]
    assert "a ring waits" in below.reasons[1]


def test_the_law_alone():
    """0.7 * 989.4e12 / 450e9 * (8 / 32) * 1.2 = 462"""
    h100 = CHIPS["NVIDIA H100 80GB HBM3"]
    assert least_queries(h100, 32, 8) == pytest.approx(461.7, abs=0.1)
    assert least_queries(h100, 32, 32) == pytest.approx(4 * least_queries(h100, 32, 8))
    assert least_queries(h100, 32, 8, "float32", balanced=True) == pytest.approx(4 * least_queries(h100, 32, 8))


def waits(choice: Any) -> dict[str, int]:
    """Microseconds, as the last reason tells them."""
    told = choice.reasons[-1].removeprefix("microseconds waited for in a forward pass: ")
    return {name: int(number.replace(",", "")) for name, number in (each.split() for each in told.split(", "))}


def test_on_a_ring_of_links_short_shards_are_gathered():
    choice = choose_strategy(8, **tokens(256))
    assert choice.strategy == "gather"
    assert "ulysses can split 8 K/V heads over 8 devices" in choice.reasons
    # A hop: 2 * 256 * 8 * 128 * 2 bytes at 90 GB/s, 11.65 us. The ring waits for 1 - 256 / 1071 of seven of them;
    # gather goes both ways round; the exchange of query and output (4 each to K and V's 1 each) crosses an eighth of 8.
    assert waits(choice) == {"ring": 62, "gather": 41, "ulysses": 58}


def test_behind_a_switch_short_shards_exchange_heads():
    choice = choose_strategy(8, **{**tokens(128), "device_kind": "NVIDIA H100 80GB HBM3"})
    assert choice.strategy == "ulysses"
    # A hop is 1.165 us; least are 0.7 * 989.4e12 / 450e9 / 4 * 1.2 = 462 queries.
    assert waits(choice) == {"ring": 6, "gather": 8, "ulysses": 5}


def test_what_cannot_be_split_is_said():
    assert "ulysses cannot split 8 K/V heads over 64 devices" in choose_strategy(64, **tokens(256)).reasons


def test_what_does_not_fit_is_not_gathered():
    strategy, reasons = choose_strategy(4096, **tokens(1000))
    assert strategy == "ring"
    assert any("gathered K/V and their gradients take too much memory, 46.9 GiB of 95" in reason for reason in reasons)


def test_a_pair_of_axes_may_exchange_inside():
    choice = choose_strategy((8, 4), **tokens(512))
    assert choice.strategy == "usp"
    assert "usp can split 8 K/V heads over 4 devices" in choice.reasons
    # A hop is 23.3 us. Nested: 31 of them, 1 - 512 / 1071 waited for. usp: the exchange, 5 hops' bytes over half a
    # link; its seven hops of four times the tokens are hidden.
    assert waits(choice) == {"ring": 377, "gather": 361, "usp": 58}
    assert waits(choose_strategy((8, 4), **tokens(128)))["usp"] == 36  # 1 - 4 * 128 / 1071 of seven of 5.8 us, and 14.6
    assert choose_strategy((8, 4), **tokens(8192)).strategy == "ring"


def test_a_window_that_needs_few_hops_speaks_for_the_ring():
    near, far = (choose_strategy(8, **tokens(256), mask=Mask(window=(left, 0))) for left in (300, 6 * 256))
    assert (near.strategy, far.strategy) == ("ring", "gather")
    assert "of each of 2 transfers" in near.reasons[1]
    assert "of each of 6 transfers" in far.reasons[1]
    anywhere = choose_strategy(8, **tokens(256), mask=Mask(window=(300, 0)), layout=None)
    assert "of each of 7 transfers" in anywhere.reasons[1]


def test_what_a_shard_sees_alone_is_not_sent():
    assert "nothing is sent" in choose_strategy(8, **tokens(256), mask=Mask(chunk=256)).reasons[0]


def test_tokens_that_cannot_lie_so_are_refused():
    with pytest.raises(ValueError, match=r"queries of all shards=24 must be a positive multiple of 2 \* context = 16"):
        choose_strategy(8, **tokens(3), layout="zigzag")


@pytest.mark.parametrize(
    ("shards", "reason"), [(1, "nothing is sent"), (8, "nothing is known of 'cpu', only of TPU v3, ")]
)
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
    jax.clear_caches()
