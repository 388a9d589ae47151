"""strategy="auto": examples of the cost model; attention runs the strategy that it picks."""

from typing import Any

import jax
import numpy as np
import pytest

from ringattn import Mask, attention, choose_strategy
from ringattn.attn.auto import min_local_queries
from ringattn.hardware import CHIPS

LLAMA: dict[str, Any] = {"heads": 32, "kv_heads": 8, "head_dim": 128, "device_kind": "TPU v5"}


def tokens(local: int) -> dict[str, Any]:
    return LLAMA | {"queries": local, "keys": local}


def test_long_shards_hide_their_transfers_in_a_ring():
    strategy, reasons = choose_strategy(64, **tokens(16_384))
    assert strategy == "ring"
    # 0.7 * 459e12 / 90e9 * (8 / 32) * 1.2 = 1,071
    assert reasons == (
        "TPU v5 at 70% of 459 TFLOP/s, 90 GB/s per link, 32 heads, 8 K/V heads: a hop needs 1,071 local queries to "
        "hide its send",
        "16,384 local queries: communication is fully hidden",
    )


@pytest.mark.parametrize(
    ("change", "min_queries"),
    [
        ({"layout": "zigzag"}, 2142),
        ({"dtype": "float32"}, 2142),
        ({"kv_heads": 32}, 4284),
        ({"mask": Mask(causal=False), "layout": "zigzag"}, 1071),
        ({"device_kind": "TPU v5 lite"}, 919.3),
    ],
)
def test_the_law_of_overlap(change, min_queries):
    even = int(min_queries) // 2 * 2  # zigzag needs an even number
    assert "fully hidden" in choose_strategy(16, **{**tokens(even + 2), **change}).reasons[1]
    below = choose_strategy(16, **{**tokens(even - 2), **change})
    assert f"a hop needs {min_queries:,.0f} local queries" in below.reasons[0]
    assert "a ring exposes" in below.reasons[1]


def test_min_local_queries():
    """0.7 * 989.4e12 / 450e9 * (8 / 32) * 1.2 = 462"""
    h100 = CHIPS["NVIDIA H100 80GB HBM3"]
    assert min_local_queries(h100, 32, 8) == pytest.approx(461.7, abs=0.1)
    assert min_local_queries(h100, 32, 32) == pytest.approx(4 * min_local_queries(h100, 32, 8))
    assert min_local_queries(h100, 32, 8, "float32", balanced=True) == pytest.approx(4 * min_local_queries(h100, 32, 8))


def exposed(choice: Any) -> dict[str, int]:
    """Returns the microseconds per strategy that the last reason gives."""
    compared = choice.reasons[-1].removeprefix("exposed microseconds per forward pass: ")
    return {name: int(number.replace(",", "")) for name, number in (entry.split() for entry in compared.split(", "))}


def test_short_shards_are_gathered_on_a_torus():
    choice = choose_strategy(8, **tokens(256))
    assert choice.strategy == "gather"
    assert "ulysses can split 8 K/V heads over 8 devices" in choice.reasons
    # A hop takes 11.65 us: 2 * 256 * 8 * 128 * 2 bytes at 90 GB/s. The ring exposes 1 - 256 / 1071 of each hop. The
    # gather sends in both directions. Query and output are four times the size of K and V; in the exchange, a byte
    # crosses an eighth of the 8 links.
    assert exposed(choice) == {"ring": 62, "gather": 41, "ulysses": 58}


def test_short_shards_exchange_heads_through_a_switch():
    choice = choose_strategy(8, **{**tokens(128), "device_kind": "NVIDIA H100 80GB HBM3"})
    assert choice.strategy == "ulysses"
    # A hop takes 1.165 us and needs 0.7 * 989.4e12 / 450e9 / 4 * 1.2 = 462 queries.
    assert exposed(choice) == {"ring": 6, "gather": 8, "ulysses": 5}


def test_reasons_name_heads_that_cannot_be_split():
    assert "ulysses cannot split 8 K/V heads over 64 devices" in choose_strategy(64, **tokens(256)).reasons


def test_gather_is_excluded_when_memory_is_too_small():
    strategy, reasons = choose_strategy(4096, **tokens(1000))
    assert strategy == "ring"
    assert any("gathered K/V and their gradients take too much memory, 46.9 GiB of 95" in reason for reason in reasons)


def test_a_pair_of_axes_can_choose_usp():
    choice = choose_strategy((8, 4), **tokens(512))
    assert choice.strategy == "usp"
    assert "usp can split 8 K/V heads over 4 devices" in choice.reasons
    # A hop takes 23.3 us. Nested ring: 31 hops, each exposed by 1 - 512 / 1071. usp: the exchange moves the bytes of 5
    # hops over half a link; its seven hops, with four times the tokens, are hidden.
    assert exposed(choice) == {"ring": 377, "gather": 361, "usp": 58}
    assert exposed(choose_strategy((8, 4), **tokens(128)))["usp"] == 36  # 7 * 5.8 * (1 - 4 * 128 / 1071) + 14.6
    assert choose_strategy((8, 4), **tokens(8192)).strategy == "ring"


def test_a_short_window_favours_the_ring():
    near, far = (choose_strategy(8, **tokens(256), mask=Mask(window=(left, 0))) for left in (300, 6 * 256))
    assert (near.strategy, far.strategy) == ("ring", "gather")
    assert "of each of 2 sends" in near.reasons[1]
    assert "of each of 6 sends" in far.reasons[1]
    unknown_positions = choose_strategy(8, **tokens(256), mask=Mask(window=(300, 0)), layout=None)
    assert "of each of 7 sends" in unknown_positions.reasons[1]


def test_nothing_is_sent_for_chunks_within_a_shard():
    assert "nothing is sent" in choose_strategy(8, **tokens(256), mask=Mask(chunk=256)).reasons[0]


def test_lengths_that_do_not_fit_the_layout_are_refused():
    with pytest.raises(ValueError, match=r"total queries=24 must be a positive multiple of 2 \* shards = 16"):
        choose_strategy(8, **tokens(3), layout="zigzag")


@pytest.mark.parametrize(
    ("shards", "reason"),
    [(1, "nothing is sent"), (8, "device_kind='cpu' has unknown FLOP/s and bandwidth; known are TPU v3")],
)
def test_the_ring_is_the_default(shards, reason):
    strategy, reasons = choose_strategy(shards, **{**tokens(64), "device_kind": "cpu"})
    assert strategy == "ring"
    assert reason in reasons[0]


def test_attention_runs_the_chosen_strategy(make_mesh, monkeypatch):
    x = np.random.default_rng(0).standard_normal((1, 64, 8, 16)).astype(np.float32)
    with jax.set_mesh(mesh := make_mesh(context=8)):
        x = jax.device_put(x, jax.NamedSharding(mesh, jax.P(None, "context")))

        def traced(strategy: str, **options: Any) -> str:
            return str(jax.make_jaxpr(lambda x: attention(x, x, x, strategy=strategy, **options))(x))

        assert traced("auto") == traced("ring")
        monkeypatch.setitem(CHIPS, "cpu", CHIPS["TPU v5"])
        jax.clear_caches()
        assert traced("auto") == traced("ulysses") != traced("ring")
        assert traced("auto", reduce_dtype="bfloat16") == traced("ulysses")  # explicit "ulysses" refuses reduce_dtype
    jax.clear_caches()
