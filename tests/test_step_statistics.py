"""Statistics of a compiled step agree with its program: bytes sent, memory, parameters."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from wire import transfers

from ringattn import config
from ringattn.cost.step_statistics import attention_statistics, describe_statistics, memory_statistics
from ringattn.hardware import CHIPS
from ringattn.mesh.axes import abstract
from ringattn.training.stage import compile_step, prepare_stage


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    directory = tmp_path_factory.mktemp("text")
    for number in range(20):
        text = np.random.default_rng(number).integers(97, 107, 150, dtype=np.uint8)
        (directory / f"{number}.txt").write_bytes(text.tobytes())
    return config.Config(
        model=config.Model(layers=2, dim=32, heads=4, kv_heads=2, head_dim=8, feed_forward=64),
        data=config.Data(path=str(directory), seq_len=64, validation=0.4),
        train=config.Train(batch_size=4, accumulate=2),
    )


@pytest.mark.parametrize("separate", [True, False], ids=["separate", "joined"])
def test_statistics_agree_with_the_program(small, make_mesh, separate):
    small = replace(small, data=replace(small.data, separate_documents=separate))
    with jax.set_mesh(mesh := make_mesh(data=2, context=4)):
        run = prepare_stage(small, mesh)
        state, batch = run.initial_state(), run.place(run.training.batch(0))
        sends = [each for each in transfers(run.train_step, state, batch) if each.primitive == "ppermute"]
        train_step, statistics = compile_step(run, state)
    arguments = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves((state, batch)))

    attention = statistics["attention"]
    reported = attention["forward_bytes_sent"] + attention["backward_bytes_sent"]
    # Segment ids are the same in all layers: JAX hoists their first send out of the scan over the layers.
    ids = 64 // 4 * 4 * separate
    assert reported == sum(each.total_bytes for each in sends) + 2 * (run.config.model.layers - 1) * ids
    assert attention["kinds"] == {"full": {"layers": 2, "strategy": "ring", "hops": 3, "max_hops": 3}}
    memory = statistics["device_bytes"]
    assert memory == memory_statistics(train_step)
    assert memory["arguments"] == arguments
    assert memory["total"] == arguments + memory["temporaries"] + memory["new_results"]
    assert 0 <= memory["new_results"] < 0.1 * arguments  # the new state reuses the memory of the old one
    assert statistics["parameters"] == 384 * 32 + 2 * (32 * 8 * 12 + 3 * 32 * 64 + 64) + 32
    assert statistics["flops_per_token"] > 6 * (statistics["parameters"] - 384 * 32)

    lines = "\n".join(describe_statistics(statistics))
    assert f"compiled in {statistics['compile_seconds']:.1f} s: {statistics['parameters']:,} parameters" in lines
    assert "attention: ring, 3 of 3 hops per layer; each device sends " in lines
    assert " required, arguments " in lines


def test_planned_memory_is_compared_with_that_of_the_chip(monkeypatch):
    compiled = jax.jit(lambda x: (x @ x).sum(0)).lower(jax.ShapeDtypeStruct((512, 512), "float32")).compile()
    unknown = memory_statistics(compiled)
    monkeypatch.setitem(CHIPS, "cpu", CHIPS["TPU v5 lite"])
    memory = memory_statistics(compiled)
    assert memory is not None
    assert unknown == memory | {"device": None}
    assert (memory["device"], memory["arguments"], memory["new_results"]) == (16 * 2**30, 512 * 512 * 4, 512 * 4)
    statistics = {"compile_seconds": 0.0, "parameters": 1, "flops_per_token": 1.0, "device_bytes": memory}
    full = {"layers": 1, "strategy": "ring", "hops": 7, "max_hops": 7}
    statistics["attention"] = {"kinds": {"full": full}, "forward_bytes_sent": 2048, "backward_bytes_sent": 3 * 2**20}
    lines = list(describe_statistics(statistics))
    assert " of 16 GiB required, arguments 1 MiB, " in lines[1]
    sent = "each device sends 2 KiB forward, 3 MiB backward per step"
    assert lines[2] == f"attention: ring, 7 of 7 hops per layer; {sent}"
    statistics["attention"]["kinds"] = {"window": full | {"hops": 1}, "full": full}
    hops = "ring, 1 of 7 hops per window layer, ring, 7 of 7 hops per full layer"
    assert list(describe_statistics(statistics))[2] == f"attention: {hops}; {sent}"


@pytest.mark.parametrize(
    ("attention", "window", "expected"),
    [
        (config.Attention(layout="contiguous"), 20, ("ring", 2, 7)),
        (config.Attention(strategy="gather"), None, ("gather", 0, 0)),
        (config.Attention(strategy="auto"), None, ("ring", 7, 7)),  # nothing is known of a CPU's speed
    ],
    ids=str,
)
def test_hops_follow_from_the_config(small, make_mesh, attention, window, expected):
    model = replace(small.model, window=window)
    c = replace(small, model=model, attention=attention, data=replace(small.data, seq_len=128))
    statistics = attention_statistics(c, make_mesh(context=8))
    (layer,) = statistics["kinds"].values()
    assert (layer["strategy"], layer["hops"], layer["max_hops"]) == expected
    assert statistics["backward_bytes_sent"] > statistics["forward_bytes_sent"] > 0


def test_layers_of_each_kind_are_counted(small, make_mesh):
    """Bytes of a pattern are those of its layers in models of one kind."""

    def statistics(**values):
        attention = config.Attention(layout="contiguous")
        c = replace(small, model=replace(small.model, **values), attention=attention)
        return attention_statistics(replace(c, data=replace(small.data, seq_len=128)), make_mesh(context=8))

    windows, full = statistics(layers=4, window=20), statistics(layers=2)
    both = statistics(layers=6, window=20, pattern=("window", "window", "full"))
    assert both["kinds"] == windows["kinds"] | full["kinds"]
    for name in ("forward_bytes_sent", "backward_bytes_sent"):
        assert both[name] == windows[name] + full[name]


@pytest.mark.parametrize("strategy", ["ring", "usp"])
def test_rematerialization_repeats_the_exchange_of_heads_but_not_the_ring(small, make_mesh, strategy):
    sent = []
    for remat in ("off", "on"):
        c = replace(small, model=replace(small.model, remat=remat), attention=config.Attention(strategy=strategy))
        with jax.set_mesh(mesh := make_mesh(data=2, context_outer=2, context=2)):
            run = prepare_stage(c, mesh)
            state = abstract(jax.eval_shape(run.initial_state), mesh)
            counts = {"ppermute": 0, "all_to_all": 0}
            for each in transfers(run.train_step, state, run.place(run.training.batch(0))):
                if each.primitive in counts:
                    counts[each.primitive] += each.times
        sent.append((counts, attention_statistics(c, mesh)["backward_bytes_sent"]))
    (off, off_bytes), (on, on_bytes) = sent
    assert on["ppermute"] == off["ppermute"] > 0
    assert (on["all_to_all"] > off["all_to_all"]) == (on_bytes > off_bytes) == (strategy == "usp")
