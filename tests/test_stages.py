"""Stages of a config: values, command-line options and error messages."""

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
FIELDS = ("train.batch_size", "mesh.data", "mesh.context")


@pytest.fixture
def staged(tmp_path):
    path = tmp_path / "staged.py"
    path.write_text(STAGED)
    return path


def test_a_stage_is_a_config_with_one_stage(staged):
    c = config.read(staged)
    assert c.stage(1) == dataclasses.replace(c, stages=(Stage(),))
    second = c.stage(2)
    assert second.train == Train(steps=3, batch_size=2, accumulate=2)
    assert second.mesh == Mesh(data=2, context=4, simulate=8)
    assert (second.data.seq_len, second.model.rope_theta, second.optimizer.learning_rate) == (4096, 1e6, 1.0)
    assert second.stages == (Stage(),)
    assert c.stage(3).data.seq_len == 8192
    assert c.stage(3).train == c.train


def test_documents_of_a_task_have_the_same_length_in_all_stages():
    stages = (config.Stage(seq_len=256), config.Stage(seq_len=512))
    with pytest.raises(
        ValueError, match=r"data.path='task:needle' must specify a document length, .* use task:needle:256"
    ):
        config.Config(data=config.Data(path="task:needle"), stages=stages)
    assert config.Config(data=config.Data(path="task:needle:256"), stages=stages).stage(2).data.seq_len == 512
    with pytest.raises(ValueError, match=r"stage 1: .*must be .*divides stages.1.seq_len=256"):
        config.Config(data=config.Data(path="task:needle:512"), stages=stages)


def test_every_field_of_a_stage_replaces_a_field_of_a_section():
    assert [field.name for field in dataclasses.fields(Stage)] == list(REPLACES)
    for name in REPLACES.values():
        section, field = name.split(".")
        assert field in vars(vars(Config())[section])


def test_steps_are_counted_over_all_stages(staged):
    c = config.read(staged)
    assert [c.steps_before(number) for number in (1, 2, 3, 4)] == [0, 9, 12, 21]
    assert [c.stage_after(step) for step in (0, 8, 9, 11, 12, 20, 21, 99)] == [1, 1, 2, 2, 3, 3, 3, 3]
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
            "--stages.4.steps: stage 4 does not exist, the config has stages 1 to 3; use --stages.3.steps, "
            "or add a Stage(...) to the config file",
        ),
        (["--stages.2.steps", "0"], "stage 2: stages.2.steps=0 must be from 1 to 2147483647"),
        (
            ["--stages.3.batch_size", "5"],
            "stage 3: stages.3.batch_size=5 must be a multiple of train.accumulate=2; use 4 or 6",
        ),
        (
            ["--stages.1.context", "-1"],
            "stage 1: mesh.data=-1 and stages.1.context=-1: only one axis can take the remaining devices; "
            "use --mesh.data 1",
        ),
    ],
)
def test_a_mistake_in_a_stage_is_one_message(capsys, staged, words, message):
    assert refusal(capsys, ["--config", str(staged), *words]) == message


def test_an_option_that_every_stage_overrides_raises(capsys, tmp_path):
    path = tmp_path / "own.py"
    path.write_text("from ringattn.config import *\nconfig = Config(stages=(Stage(steps=1), Stage(steps=2)))\n")
    output = refusal(capsys, ["--config", str(path), "--train.steps", "5"])
    fix = "--stages.1.steps 5 --stages.2.steps 5"
    assert output == f"--train.steps 5 has no effect, because every stage overrides it; use {fix}"
    assert config.parse(["--config", str(path), *fix.split()], "A test.").steps_before(3) == 10
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
            "stage 2: stages.2.rope_theta=0.0 must be more than 1, such as 10000",
        ),
    ],
)
def test_a_mistake_in_the_stages_of_a_file_is_one_message(capsys, tmp_path, text, message):
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
def test_a_mistake_in_the_stages_of_json_is_one_message(capsys, tmp_path, text, message):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")):
        config.load(path)
    assert refusal(capsys, ["--config", str(path)]).startswith(f"{path}: ")


@given(
    stages=st.lists(
        st.builds(
            Stage,
            steps=st.none() | st.integers(1, 2**31 - 1),
            learning_rate=st.none() | st.floats(1e-30, 1e30),
            context=st.none() | st.integers(1, 9),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_stages_load_equal_from_json(tmp_path_factory, stages):
    path = tmp_path_factory.mktemp("run") / "config.json"
    run = Config(model=Model(layers=2), stages=tuple(stages))
    path.write_text(config.to_json(run))
    assert config.load(path) == run


def test_help_lists_every_stage_by_its_number(capsys, staged):
    for words, count in ((["--help"], 1), (["--config", str(staged), "--help"], 3)):
        with pytest.raises(SystemExit) as stop:
            config.parse(words, "A test.")
        assert stop.value.code == 0
        output = " ".join(capsys.readouterr().out.replace("│", " ").split())
        for number in range(count + 2):
            for field in dataclasses.fields(Stage):
                assert (f"--stages.{number}.{field.name} " in output) == (1 <= number <= count)
    assert (
        "--stages.2.seq_len INT or None Tokens per row (L). None: the value of data.seq_len. (default: 4096)" in output
    )


def test_an_error_names_its_stage_and_the_options_of_that_stage():
    stages = (Stage(), Stage(batch_size=2, data=2))
    expected = r"^stage 2: stages.2.batch_size=3 must be a multiple of stages.2.data, not of mesh.context$"
    with pytest.raises(ValueError, match=expected), config.stage_errors(stages, 2):
        raise ValueError("{}=3 must be a multiple of {}, not of {}".format(*map(config.option, FIELDS)))
    with pytest.raises(ValueError, match=r"^use --stages.1.data 4$"), config.stage_errors(stages[1:], 1):
        raise ValueError(f"use --{config.option('mesh.data')} 4")
    with pytest.raises(ValueError, match=r"^mesh.data$"), config.stage_errors((Stage(),), 1):
        raise ValueError(config.option("mesh.data"))
    assert [config.option(name) for name in FIELDS] == list(FIELDS)
