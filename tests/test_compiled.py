import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from wire import transfers

from ringattn import config
from ringattn.hardware import CHIPS
from ringattn.training.compiled import attention_facts, compile_step, in_words, planned_bytes, write
from ringattn.training.run import prepare


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for number in range(20):
        text = np.random.default_rng(number).integers(97, 107, 150, dtype=np.uint8)
        (folder / f"{number}.txt").write_bytes(text.tobytes())
    return config.Config(
        model=config.Model(layers=2, dim=32, heads=4, kv_heads=2, head_dim=8, feed_forward=64),
        data=config.Data(path=str(folder), seq_len=64, validation=0.4),
        train=config.Train(batch_size=4, accumulate=2),
    )


@pytest.fixture
def prepared(small, make_mesh):
    """A run on a ring of four, twice, and the state it begins with."""
    with jax.set_mesh(over := make_mesh(data=2, context=4)):
        run = prepare(small, over)
        yield run, run.initial_state()


def test_what_is_said_of_a_step_is_so(prepared, tmp_path, capsys):
    run, state = prepared
    batch = run.on_devices(run.rows.batch(0))
    sent = sum(each.total_bytes for each in transfers(run.train_step, state, batch) if each.primitive == "ppermute")
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves((state, batch)))
    _, facts = compile_step(run, state)

    attention = facts["attention"]
    said = attention["forward_bytes_sent"] + attention["backward_bytes_sent"]
    # Segment ids are the same for all layers: JAX takes their first departure out of the layers' loop.
    ids = 64 // 4 * 4
    assert said == sent + 2 * (run.config.model.layers - 1) * ids
    assert (attention["strategy"], attention["hops"], attention["most_hops"]) == ("ring", 3, 3)
    plan = facts["device_bytes"]
    assert plan["arguments"] == held
    assert plan["total"] == held + plan["temporaries"] + plan["new_results"]
    assert 0 <= plan["new_results"] < 0.1 * held  # the new state takes the old one's place
    assert facts["parameters"] == 384 * 32 + 2 * (32 * 8 * 12 + 3 * 32 * 64 + 64) + 32
    assert facts["flops_per_token"] > 6 * (facts["parameters"] - 384 * 32)

    write(facts, tmp_path / "compiled.json")
    assert json.loads((tmp_path / "compiled.json").read_text()) == facts
    lines = "\n".join(in_words(facts))
    assert f"compiled in {facts['compile_seconds']:.1f} s: {facts['parameters']:,} parameters" in lines
    assert "attention by ring, 3 of 3 hops a layer" in lines
    assert " planned, arguments " in lines


def test_memory_is_set_against_the_chips(monkeypatch):
    compiled = jax.jit(lambda x: (x @ x).sum(0)).lower(jax.ShapeDtypeStruct((512, 512), "float32")).compile()
    unknown = planned_bytes(compiled)
    monkeypatch.setitem(CHIPS, "cpu", CHIPS["TPU v5 lite"])
    plan = planned_bytes(compiled)
    assert plan is not None
    assert unknown == plan | {"device": None}
    assert (plan["device"], plan["arguments"], plan["new_results"]) == (16 * 2**30, 512 * 512 * 4, 512 * 4)
    said = {"compile_seconds": 0.0, "parameters": 1, "flops_per_token": 1.0, "device_bytes": plan}
    said["attention"] = {"strategy": "ring", "hops": 1, "most_hops": 7, "forward_bytes_sent": 2048}
    said["attention"] |= {"backward_bytes_sent": 3 * 2**20}
    lines = list(in_words(said))
    assert " planned of 16 GiB, arguments 1 MiB, " in lines[1]
    assert lines[2] == "attention by ring, 1 of 7 hops a layer: a device sends 2 KiB a step forward, 3 MiB backward"


@pytest.mark.parametrize(
    ("attention", "expected"),
    [
        (config.Attention(layout="contiguous", window=20), ("ring", 2, 7)),
        (config.Attention(strategy="gather"), ("gather", 0, 0)),
        (config.Attention(strategy="auto"), ("ring", 7, 7)),  # of a processor nothing is known
    ],
    ids=str,
)
def test_hops_by_the_config(small, make_mesh, attention, expected):
    c = replace(small, attention=attention, data=replace(small.data, seq_len=128))
    facts = attention_facts(c, make_mesh(context=8))
    assert (facts["strategy"], facts["hops"], facts["most_hops"]) == expected
    assert facts["backward_bytes_sent"] > facts["forward_bytes_sent"] > 0


@pytest.mark.parametrize("strategy", ["ring", "usp"])
def test_a_layer_that_is_computed_again_exchanges_heads_again_but_turns_no_kv(small, make_mesh, strategy):
    sent = []
    for remat in ("off", "on"):
        c = replace(small, model=replace(small.model, remat=remat), attention=config.Attention(strategy=strategy))
        with jax.set_mesh(over := make_mesh(data=2, context_outer=2, context=2)):
            run = prepare(c, over)
            arrays = run.initial_state(), run.on_devices(run.rows.batch(0))
            kinds = {"ppermute": 0, "all_to_all": 0}
            for each in transfers(run.train_step, *arrays):
                if each.primitive in kinds:
                    kinds[each.primitive] += each.times
        sent.append((kinds, attention_facts(c, over)["backward_bytes_sent"]))
    (off, off_bytes), (on, on_bytes) = sent
    assert on["ppermute"] == off["ppermute"] > 0
    assert (on["all_to_all"] > off["all_to_all"]) == (on_bytes > off_bytes) == (strategy == "usp")
