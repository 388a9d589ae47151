"""Stages in a config: what each comes to, how they are given, and what a mistake in one is answered with."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_config import refusal

from ringattn import config
from ringattn.config import Config, Mesh, Model, Stage, Train
from ringattn.config.stages import REPLACES

STAGED = """
from ringattn.config import *

config = Config(
    mesh=Mesh(data=-1, context=8, simulate=8),
    train=Train(steps=9, batch_size=4, accumulate=2),
    stages=(
        Stage(),
        Stage(steps=3, seq_len=4096, batch_size=2, learning_rate=1, rope_theta=1e6, data=2, context=4),
        Stage(seq_len=8192),
    ),
)
"""


@pytest.fixture
def staged(tmp_path):
    path = tmp_path / "staged.py"
    path.write_text(STAGED)
    return path


def test_a_stage_is_a_config_of_its_own(staged):
    c = config.read(staged)
    assert c.stage(1) == dataclasses.replace(c, stages=(Stage(),))
    second = c.stage(2)
    assert second.train == Train(steps=3, batch_size=2, accumulate=2)
    assert second.mesh == Mesh(data=2, context=4, simulate=8)
    assert (second.data.seq_len, second.model.rope_theta, second.optimizer.learning_rate) == (4096, 1e6, 1.0)
    assert second.stages == (Stage(),)
    assert c.stage(3).data.seq_len == 8192
    assert c.stage(3).train == c.train


def test_documents_of_a_task_have_one_length_in_all_stages():
    stages = (config.Stage(seq_len=256), config.Stage(seq_len=512))
    with pytest.raises(ValueError, match=r"'task:needle' with rows of several lengths: say .* task:needle:256"):
        config.Config(data=config.Data(path="task:needle"), stages=stages)
    assert config.Config(data=config.Data(path="task:needle:256"), stages=stages).stage(2).data.seq_len == 512
    with pytest.raises(ValueError, match=r"stage 1: .*must be .*divides stages.1.seq_len=256"):
        config.Config(data=config.Data(path="task:needle:512"), stages=stages)


def test_every_field_of_a_stage_stands_for_one_of_a_section():
    assert [each.name for each in dataclasses.fields(Stage)] == list(REPLACES)
    for name in REPLACES.values():
        section, each = name.split(".")
        assert each in vars(vars(Config())[section])


def test_steps_are_counted_over_all_stages(staged):
    c = config.read(staged)
    assert [c.steps_before(number) for number in (1, 2, 3, 4)] == [0, 9, 12, 21]
    found = [c.stage_after(step) for step in (0, 8, 9, 11, 12, 20, 21, 99)]
    assert found == [1, 1, 2, 2, 3, 3, 3, 3]
    assert Config().stage_after(10**9) == 1


def test_a_stage_is_overridden_by_its_number(staged):
    words = ["--stages.2.steps", "30", "--stages.2.rope_theta", "None", "--stages.1.context=4", "--train.steps", "7"]
    c = config.parse(["--config", str(staged), *words], "A test.")
    assert c.stages[0] == Stage(context=4)
    assert (c.stages[1].steps, c.stages[1].rope_theta, c.stages[1].seq_len) == (30, None, 4096)
    assert c.steps_before(4) == 7 + 30 + 7


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--stages.2.stepz", "3"], "unknown '--stages.2.stepz': did you mean '--stages.2.steps'?"),
        (["--stages.steps", "3"], "unknown '--stages.steps': did you mean '--stages.1.steps'?"),
        (["--stages.2.steps", "x"], "--stages.2.steps x must be an integer or None"),
        (
            ["--stages.4.steps", "3"],
            "--stages.4.steps, but the config's stages are numbered 1 to 3: use --stages.3.steps, "
            "or add a Stage(...) to the config's file",
        ),
        (["--stages.2.steps", "0"], "stage 2: stages.2.steps=0 must be at least 1"),
        (
            ["--stages.3.batch_size", "5"],
            "stage 3: stages.3.batch_size=5 must be a multiple of train.accumulate=2: use 4 or 6",
        ),
        (
            ["--stages.1.context", "-1"],
            "stage 1: mesh.data=-1 and stages.1.context=-1: only one axis can take what the others leave; "
            "set --mesh.data 1",
        ),
    ],
)
def test_a_mistake_in_a_stage_is_one_message(capsys, staged, words, message):
    assert refusal(capsys, ["--config", str(staged), *words]) == message


def test_a_flag_that_every_stage_overrules_is_refused(capsys, tmp_path):
    path = tmp_path / "own.py"
    path.write_text("from ringattn.config import *\nconfig = Config(stages=(Stage(steps=1), Stage(steps=2)))\n")
    said = refusal(capsys, ["--config", str(path), "--train.steps", "5"])
    cure = "--stages.1.steps 5 --stages.2.steps 5"
    assert said == f"--train.steps 5 changes nothing, for every stage has its own: use {cure}"
    assert config.parse(["--config", str(path), *cure.split()], "A test.").steps_before(3) == 10
    c = config.parse(["--config", str(path), "--train.steps", "5", "--stages.2.steps", "None"], "A test.")
    assert c.steps_before(3) == 6


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stages=(Stage(stepz=3),)", "unknown 'stage.stepz': did you mean 'stage.steps'?"),
        ("stages=(Stage(steps=3.5),)", "stage.steps=3.5 must be an integer or None"),
        ("stages=()", "stages=() must be one or more Stage(...)"),
        (
            "stages=Train()",
            "stages=Train(steps=200, batch_size=4, accumulate=1, seed=0) must be one or more Stage(...)",
        ),
        ("stages=(Stage(seq_len=0),)", "stages.1.seq_len=0 must be at least 1"),
        (
            "stages=(Stage(), Stage(rope_theta=0))",
            "stage 2: stages.2.rope_theta=0.0 must be positive, and more than 1, such as 10000",
        ),
    ],
)
def test_a_mistake_in_a_file_s_stages_is_one_message(capsys, tmp_path, text, message):
    path = tmp_path / "mistaken.py"
    path.write_text(f"from ringattn.config import *\nconfig = Config({text})\n")
    assert refusal(capsys, ["--config", str(path)]) == f"{path}, line 2: {message}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"stages": [{}, {"stepz": 2}]}', "unknown 'stages.2.stepz': did you mean 'stages.2.steps'?"),
        ('{"stages": [{}, {"steps": 2.5}]}', "stages.2.steps=2.5 must be an integer or None"),
        ('{"stages": [3]}', "stages.1=3 must be a JSON object"),
        ('{"stages": []}', "stages=() must be one or more Stage(...)"),
        ('{"stages": 3}', "stages=3 must be one or more Stage(...)"),
        ('{"stages": [{}, {"data": 0}]}', "stage 2: stages.2.data=0 must be at least 1, or -1 .*"),
    ],
)
def test_a_mistake_in_json_s_stages_is_one_message(capsys, tmp_path, text, message):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")):
        config.load(path)
    assert refusal(capsys, ["--config", str(path)]).startswith(f"{path}: ")


@given(
    stages=st.lists(
        st.builds(
            Stage,
            steps=st.none() | st.integers(1, 2**60),
            learning_rate=st.none() | st.floats(1e-30, 1e30),
            context=st.none() | st.integers(1, 9),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_stages_that_are_saved_load_equal(tmp_path_factory, stages):
    path = tmp_path_factory.mktemp("run") / "config.json"
    run = Config(model=Model(layers=2), stages=tuple(stages))
    config.save(run, path)
    assert config.load(path) == run


def test_help_lists_every_stage_by_its_number(capsys, staged):
    for words, count in ((["--help"], 1), (["--config", str(staged), "--help"], 3)):
        with pytest.raises(SystemExit) as stop:
            config.parse(words, "A test.")
        assert stop.value.code == 0
        said = " ".join(capsys.readouterr().out.replace("│", " ").split())
        for number in range(count + 2):
            for each in dataclasses.fields(Stage):
                assert (f"--stages.{number}.{each.name} " in said) == (1 <= number <= count)
    assert "--stages.2.seq_len {None}|INT Tokens in a row (L). (default: 4096)" in said


def test_an_error_says_whose_it_is_in_the_words_of_the_whole():
    stages = (Stage(), Stage(batch_size=2, data=2))
    said = r"^stage 2: stages.2.batch_size=3 x mesh.context, not my_train.batch_size, 2$"
    with pytest.raises(ValueError, match=said), config.said_of(stages, 2):
        raise ValueError("train.batch_size=3 x mesh.context, not my_train.batch_size, 2")
    with pytest.raises(ValueError, match=r"^use --stages.1.data 4$"), config.said_of(stages[1:], 1):
        raise ValueError("use --mesh.data 4")
    with pytest.raises(ValueError, match=r"^mesh.data$"), config.said_of((Stage(),), 1):
        raise ValueError("mesh.data")
