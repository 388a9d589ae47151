import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringattn import config
from ringattn.config import Benchmark, Config, Data, Mesh, Model, Train
from ringattn.config.files import SCRIPTS

BASE = "from ringattn.config import *\nconfig = Config(name='base', model=Model(layers=2), mesh=Mesh(simulate=8))\n"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.py"
    path.write_text(BASE)
    return path


def refusal(capsys, argv: list[str], kind: type = Config) -> str:
    """Returns the error message of `parse`, after checking that it is one line without traceback, with status 2."""
    with pytest.raises(SystemExit) as stop:
        config.parse(argv, "A test.", kind)
    assert stop.value.code == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("error: ")
    assert output.err.count("\n") == 1
    return output.err.removeprefix("error: ").rstrip("\n")


def test_a_file_is_read_and_overridden(base):
    argv = ["--config", str(base), "--model.head_dim", "64", "--model.tied", "False", "--optimizer.learning_rate=1"]
    parsed = config.parse([*argv, "--model.window", "7", "--mesh.data", "-1", "--mesh.context", "2"], "A test.")
    assert parsed.name == "base"
    assert parsed.model == Model(layers=2, head_dim=64, tied=False, window=7)
    assert parsed.mesh == Mesh(simulate=8, data=-1, context=2)
    assert parsed.optimizer.learning_rate == 1.0
    assert type(parsed.optimizer.learning_rate) is float
    assert parsed.train == Train()
    again = config.parse(["--config", str(base), "--model.window", "3", "--model.window", "None"], "A test.")
    assert again.model.window is None  # the last counts


def test_a_config_file_can_import_a_file_of_its_directory(tmp_path, base):
    for directory, layers in ((tmp_path, 2), (tmp_path / "other", 5)):
        directory.mkdir(exist_ok=True)
        (directory / "base.py").write_text(BASE.replace("layers=2", f"layers={layers}"))
        child = directory / "child.py"
        child.write_text(
            "import dataclasses\nfrom base import config\nconfig = dataclasses.replace(config, name='c')\n"
        )
        assert config.read(child) == Config(name="c", model=Model(layers=layers), mesh=Mesh(simulate=8))


def test_a_misspelt_config_option_is_named(capsys, base):
    assert refusal(capsys, ["--confi", str(base)]) == "unknown '--confi': did you mean '--config'?"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--optimizer.learning_rat", "1"],
            "unknown '--optimizer.learning_rat': did you mean '--optimizer.learning_rate'?",
        ),
        (["--learning_rate", "1"], "unknown '--learning_rate': did you mean '--optimizer.learning_rate'?"),
        (["--xyzzy", "1"], "unknown '--xyzzy': --help lists all options"),
        (["--" + "x" * 5000, "1"], "unknown '--" + "x" * 97 + ": --help lists all options"),
        (["--optimizer.learning_rate", "fast"], "--optimizer.learning_rate fast must be a finite number"),
        (["--optimizer.learning_rate", "nan"], "--optimizer.learning_rate nan must be a finite number"),
        (["--train.steps", "1.5"], "--train.steps 1.5 must be an integer"),
        (["--model.window", "1.5"], "--model.window 1.5 must be an integer or None"),
        (["--attention.window", "7"], "unknown '--attention.window': did you mean '--model.window'?"),
        (
            ["--model.pattern", "window", "ful"],
            "--model.pattern window ful must be one or more of 'window', 'full' or None",
        ),
        (
            ["--model.family", "gemma"],
            "--model.family gemma must be one of 'llama', 'mistral', 'qwen2', 'qwen3', 'gemma2', 'gemma3'",
        ),
        (["--attention.layout", "x"], "--attention.layout x must be one of 'contiguous', 'striped', 'zigzag'"),
        (["--model.tied", "1"], "--model.tied 1 must be True or False"),
        (["--train.steps"], "--train.steps needs a value: an integer"),
        (
            ["--attention.layout", "a\nb\x1b"],
            r"--attention.layout a\nb\x1b must be one of 'contiguous', 'striped', 'zigzag'",
        ),
        (["--train.steps", "9" * 5000], f"--train.steps {'9' * 400}...{'9' * 100} must be an integer"),
        (["--train.steps", "--train.seed", "1"], "--train.steps needs a value: an integer"),
        (["train.steps", "3"], "unexpected 'train.steps'; write options as --option VALUE"),
        (["--model.heads", "9"], "model.heads=9 must be a multiple of model.kv_heads=4; use 8 or 12"),
        (
            ["--profile", "10"],
            "profile='10' must be START:STOP, the first and last step to profile, such as '10:12'",
        ),
        (
            ["--name", "../x"],
            "name='../x' must be a plain directory name: letters, digits and . _ + = -, such as 'run-2'",
        ),
    ],
)
def test_a_mistake_on_the_command_line_is_one_message(capsys, base, words, message):
    assert refusal(capsys, ["--config", str(base), *words]) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "config = Config(\n  model=Model(layerz=2))",
            "{path}, line 3: unknown 'model.layerz': did you mean 'model.layers'?",
        ),
        ("config = Config(modle=Model())", "{path}, line 2: unknown 'modle': did you mean 'model'?"),
        ("config = Config(train=Train(steps='9'))", "{path}, line 2: train.steps='9' must be an integer"),
        ("config = Config(train=Train(steps=True))", "{path}, line 2: train.steps=True must be an integer"),
        ("config = Config(train=9)", "{path}, line 2: train=9 must be a section Train(...)"),
        ("config = Config(", "{path}, line 2: '(' was never closed"),
        ("1 / 0", "{path}, line 2: ZeroDivisionError: division by zero"),
        ("\0", "{path}, line 1: source code string cannot contain null bytes"),
        ("", "{path} defines no `config`; write `config = Config(...)`, from ringattn.config"),
        ("config = 3", "{path} defines `config` as int; write `config = Config(...)`, from ringattn.config"),
    ],
)
def test_a_mistake_in_a_file_is_one_message(capsys, tmp_path, text, message):
    path = tmp_path / "mistaken.py"
    path.write_text(f"from ringattn.config import *\n{text}\n")
    assert refusal(capsys, ["--config", str(path)]) == message.format(path=path)


def test_a_mistake_in_an_imported_file_names_that_file(capsys, tmp_path):
    (tmp_path / "parent.py").write_text("from ringattn.config import *\n\nconfig = Config(nme='x')\n")
    (tmp_path / "child.py").write_text("from parent import config\n")
    message = refusal(capsys, ["--config", str(tmp_path / "child.py")])
    assert message == f"{tmp_path / 'parent.py'}, line 3: unknown 'nme': did you mean 'name'?"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"model": {"layerz": 2}}', "unknown 'model.layerz': did you mean 'model.layers'?"),
        ('{"modle": {}}', "unknown 'modle': did you mean 'model'?"),
        ('{"train": {"steps": 1.0}}', "train.steps=1.0 must be an integer"),
        ('{"optimizer": {"clip_norm": Infinity}}', "optimizer.clip_norm=inf must be a finite number"),
        ('{"train": 5}', "train=5 must be a JSON object"),
        ("[]", "config=[] must be a JSON object"),
        ('{"train"', "Expecting ':' delimiter: line 1 column 9 (char 8)"),
        ('{"train": {"steps": 1, "steps": 2}}', "the key 'steps' occurs twice"),
        ("[" * 100_000, "it is nested too deeply, so it is not a config"),
        (" " * 2**24 + "{}", "it has 16,777,218 bytes, more than 16,777,216, so it is not a config"),
    ],
)
def test_a_mistake_in_json_is_one_message(capsys, tmp_path, text, message):
    path = tmp_path / "config.json"
    path.write_text(text)
    assert refusal(capsys, ["--config", str(path)]) == f"{path}: {message}"


def test_a_config_is_required_and_must_exist(capsys, base):
    assert refusal(capsys, []) == "--config is required, such as --config configs/quickstart.py"
    assert refusal(capsys, ["--config", "missing.py"]) == "config file missing.py does not exist"
    long = "x" * 300
    assert refusal(capsys, ["--config", long]) == f"config file {long} cannot be opened (File name too long)"
    misspelt = base.with_name("bsae.py")
    message = f"config file {misspelt} does not exist: did you mean {base}?"
    assert refusal(capsys, ["--config", str(misspelt)]) == message
    assert refusal(capsys, ["--config", "quickstart"]) == (
        "config file quickstart does not exist: did you mean configs/quickstart.py?"
    )
    assert refusal(capsys, ["--config", str(base.parent)]).startswith(f"config file {base.parent} is a directory")
    text_file = base.rename(base.with_suffix(".txt"))
    assert refusal(capsys, ["--config", str(text_file)]) == f"config file {text_file} must end in .py or .json"


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        (Model, {"layers": 0}, "model.layers=0 must be from 1 to 2147483647"),
        (Model, {"layers": 2**63}, "model.layers=9223372036854775808 must be from 1 to 2147483647"),
        (Model, {"head_dim": 33}, "model.head_dim=33 must be even.*use 32 or 34"),
        (Model, {"rope_theta": 0}, "model.rope_theta=0.0 must be more than 1"),
        (config.Data, {"validation": 1}, "data.validation=1.0 must be between 0 and 1"),
        (config.Data, {"path": ""}, "data.path='' must be a file"),
        (config.Data, {"path": "task:needel"}, "data.path: unknown 'task:needel': did you mean 'task:needle'"),
        (config.Data, {"path": "task:needle:100"}, "'task:needle:100' must be .*divides data.seq_len=2048"),
        (config.Data, {"path": "task:needle:x"}, "'task:needle:x' must be task:needle or task:needle:LENGTH"),
        (Mesh, {"context": 0}, "mesh.context=0 must be at least 1, or -1"),
        (Mesh, {"data": -1}, "mesh.data=-1 and mesh.context=-1: only one.*use --mesh.data 1"),
        (Mesh, {"simulate": -1}, "mesh.simulate=-1 must be at least 0"),
        (config.Evaluation, {"samples": 10**15}, "samples=1000000000000000 must be from 1 to 1000000"),
        (config.Train, {"steps": 2**31}, "train.steps=2147483648 must be from 1 to 2147483647"),
        (config.Train, {"seed": 10**20}, "train.seed=100000000000000000000 must be from 0 to 9223372036854775807"),
        (config.Optimizer, {"warmup_steps": 10**12}, "warmup_steps=1000000000000 must be from 0 to 2147483647"),
        (Model, {"window": -1}, "model.window=-1 must be from 0 to 1073741824, or None"),
        (Model, {"window": 2**31}, "model.window=2147483648 must be from 0 to 1073741824, or None"),
        (Model, {"norm_epsilon": 10**400}, "model.norm_epsilon=10+ must be a finite number"),
        (Model, {"pattern": ("window",)}, r"model.pattern=.* must be without 'window', .*; set model.window"),
        (Model, {"pattern": ("full",), "window": 3}, r"model.window=3 must be None, because model.pattern=.*; add one"),
        (Model, {"pattern": ()}, "model.pattern=.* must be one or more of 'window', 'full' or None"),
        (Model, {"rope_local_theta": 1e4}, "rope_local_theta=10000.0 must be None, because model.window=None"),
        (Model, {"rope_local_theta": 1.0, "window": 3}, "rope_local_theta=1.0 must be more than 1"),
        (Model, {"query_scale": 0.0}, "query_scale=0.0 must be positive, or None"),
        (Model, {"soft_cap": -1.0}, "soft_cap=-1.0 must be positive, 0 for no cap, or None"),
        (Model, {"final_soft_cap": -1.0}, "final_soft_cap=-1.0 must be positive, 0 for no cap, or None"),
        (Model, {"norm_epsilon": 0.0}, "norm_epsilon=0.0 must be positive"),
        (config.Optimizer, {"beta2": 1}, "optimizer.beta2=1.0 must be at least 0 and less than 1"),
        (config.Optimizer, {"final_fraction": 1.5}, "optimizer.final_fraction=1.5 must be between 0 and 1"),
        (Train, {"batch_size": 6, "accumulate": 4}, "train.batch_size=6 .*train.accumulate=4; use 4 or 8"),
        (config.Validation, {"every": 0}, "validation.every=0 must be at least 1"),
        (config.Checkpoint, {"keep": 0}, "checkpoint.keep=0 must be at least 1"),
        (config.Log, {"directory": ""}, "log.directory='' must be a directory"),
        (Config, {"profile": "3:2"}, "profile='3:2' must be START:STOP"),
        (Config, {"profile": "0:2"}, "profile='0:2' must be START:STOP"),
        (Config, {"profile": "2:x:3"}, "profile='2:x:3' must be START:STOP"),
        (Config, {"resume": "maybe"}, "resume='maybe' must be one of 'never', 'auto', 'must'"),
    ],
)
def test_a_section_validates_its_values(section, values, message):
    with pytest.raises(ValueError, match=message):
        section(**values)


def test_help_lists_every_field_with_the_defaults_of_the_config_file(capsys, base):
    for words, layers in ((["--help"], 4), (["--config", str(base), "-h"], 2)):
        with pytest.raises(SystemExit) as stop:
            config.parse(words, "A test.")
        assert stop.value.code == 0
        output = " ".join(capsys.readouterr().out.replace("│", " ").split())
        assert f"--model.layers INT Number of transformer layers. (default: {layers})" in output
        assert "--config CONFIG Python file that defines `config`" in output
        for section in dataclasses.fields(Config):
            if dataclasses.is_dataclass(section.type):
                assert all(f"--{section.name}.{field.name} " in output for field in dataclasses.fields(section.type))


@given(
    rate=st.floats(1e-30, 1e30),
    steps=st.integers(21, 2**31 - 1),
    window=st.none() | st.integers(0, 2**30),
    text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1),
)
def test_json_loads_equal(tmp_path_factory, rate, steps, window, text):
    run = Config(
        optimizer=config.Optimizer(learning_rate=rate),
        train=Train(steps=steps),
        model=Model(window=window, pattern=None if window is None else ("window", "full")),
        data=config.Data(path=text),
    )
    path = tmp_path_factory.mktemp("run") / "config.json"
    path.write_text(config.to_json(run), encoding="utf-8")
    assert config.load(path) == run


def test_json_contains_every_value():
    values = json.loads(json.dumps(dataclasses.asdict(Config())))  # tuples become lists
    assert json.loads(config.to_json(Config())) == values


def test_summary_lists_the_values_that_differ():
    run = Config(name="long", model=Model(dim=512, layers=9), train=Train(steps=999))
    assert config.summary(run).splitlines() == [
        "config long (section values that differ from the defaults)",
        "  model      layers=9  dim=512",
        "  train      steps=999",
    ]


def test_reported_errors_reports_only_value_errors(capsys):
    with pytest.raises(SystemExit) as stop, config.reported_errors():
        raise ValueError("seq_len=3; use 4")
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: seq_len=3; use 4\n"
    with pytest.raises(RuntimeError, match="fault"), config.reported_errors():
        raise RuntimeError("fault")


def test_a_mistake_ends_a_script_with_status_2_and_no_traceback(base):
    code = "import sys; from ringattn import config; config.parse(sys.argv[1:], 'A test.')"
    command = [sys.executable, "-c", code, "--config", str(base), "--mesh.contxt", "3"]
    environ = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, env=environ, timeout=60)
    assert done.returncode == 2
    assert done.stderr == "error: unknown '--mesh.contxt': did you mean '--mesh.context'?\n"


BENCHMARK = "from ringattn.config import *\nconfig = Benchmark(name='b', subjects=('ring zigzag', 'dense'))\n"


@pytest.fixture
def benchmark(tmp_path: Path) -> Path:
    path = tmp_path / "benchmark.py"
    path.write_text(BENCHMARK)
    return path


def test_several_values_are_several_words(benchmark):
    words = ["--config", str(benchmark), "--rings", "2", "-1", "--subjects", "ring zigzag", "gather striped"]
    parsed = config.parse([*words, "--baselines=gather striped", "--seconds", "5"], "A test.", Benchmark)
    subjects = ("ring zigzag", "gather striped")
    assert parsed == Benchmark(name="b", rings=(2, -1), subjects=subjects, baselines=subjects[1:], seconds=5)
    benchmark.with_suffix(".json").write_text(config.to_json(parsed))
    assert config.read(benchmark.with_suffix(".json"), Benchmark) == parsed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ring", "1"], "unknown '--ring': did you mean '--rings'?"),
        (["--rings"], "--rings needs a value: one or more integers"),
        (["--rings", "1", "x"], "--rings 1 x must be one or more integers"),
        (["--rings", "0"], "rings=(0,) must be at least 1 each, or -1 for all devices"),
        (["--rings", "2", "2"], "rings=(2, 2) must be free of duplicates"),
        (["--shard_tokens", "0"], "shard_tokens=(0,) must be at least 1 each"),
        (["--heads", "9"], "heads=9 must be a multiple of kv_heads=8; use 8 or 16"),
        (["--subjects", "rng zigzag"], "unknown subject 'rng zigzag': did you mean 'ring zigzag'?"),
        (["--subjects", "dense", "ring"], "unknown subject 'ring': did you mean 'ring zigzag'?"),
        (
            ["--baselines", "ringattention"],
            "baselines=('ringattention',) must be chosen from the subjects; use one of 'ring zigzag', 'dense'",
        ),
        (
            ["--name", "../x"],
            "name='../x' must be a plain directory name: letters, digits and . _ + = -, such as 'run-2'",
        ),
    ],
)
def test_a_mistake_in_a_benchmark_is_one_message(capsys, benchmark, words, message):
    assert refusal(capsys, ["--config", str(benchmark), *words], Benchmark) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("xyz window=3", "unknown subject 'xyz window=3'; use one of ring contiguous, ring striped, .*, ringattention"),
        ("ring zigzg window=3", "unknown subject .*: did you mean 'ring zigzag window=3'"),
        ("ring zigzag windw=3", "unknown 'windw=3' in subject .*: did you mean 'ring zigzag window=3'"),
        ("ring zigzag size=3", "unknown 'size=3' in subject .*: 'ring zigzag' takes window=N and documents=N"),
        ("dense window=3", "unknown 'window=3' in subject 'dense window=3': 'dense' takes no options"),
        ("ringattention window=3", "'ringattention' takes documents=N"),
        ("ring zigzag window=-1", "'window=-1' must be window=N, given once, with an integer N >= 0"),
        ("ring zigzag documents=0", "'documents=0' must be documents=N, given once, with an integer N >= 1"),
        ("ring zigzag window=1 window=1", "must be window=N, given once"),
    ],
)
def test_a_mistake_in_a_subject_suggests_the_nearest(text, message):
    with pytest.raises(ValueError, match=message):
        config.parse_subject(text)


def test_subjects_are_parsed():
    assert config.parse_subject("dense") == config.Subject("dense")
    assert config.parse_subject("ring striped documents=16 window=0") == config.Subject("ring", "striped", 0, 16)


def test_a_config_of_another_script_is_one_message(capsys, base, benchmark):
    use_benchmark = "use a Benchmark, such as configs/benchmark.py"
    use_training = "use a Config, such as configs/quickstart.py"
    for path, kind, saved in ((base, Config, Config()), (benchmark, Benchmark, Benchmark())):
        json_path = path.with_suffix(".json")
        json_path.write_text(config.to_json(saved))
        other, fix = (Benchmark, use_benchmark) if kind is Config else (Config, use_training)
        for config_file in (path, json_path):
            message = f"{config_file} defines a {kind.__name__} for {SCRIPTS[kind][0]}; {fix}"
            assert refusal(capsys, ["--config", str(config_file)], other) == message
    assert refusal(capsys, [], Benchmark) == "--config is required, such as --config configs/benchmark.py"


def test_a_misspelt_field_of_a_benchmark_suggests_the_nearest(capsys, benchmark):
    benchmark.write_text("from ringattn.config import *\nconfig = Benchmark(ring=(1,))\n")
    output = refusal(capsys, ["--config", str(benchmark)], Benchmark)
    assert output == f"{benchmark}, line 2: unknown 'ring': did you mean 'rings'?"
    benchmark.write_text("from ringattn.config import *\nconfig = Benchmark(rings=[1])\n")
    output = refusal(capsys, ["--config", str(benchmark)], Benchmark)
    assert output == f"{benchmark}, line 2: rings=[1] must be one or more integers"


def test_help_lists_every_field_of_a_benchmark(capsys, benchmark):
    with pytest.raises(SystemExit) as stop:
        config.parse(["--config", str(benchmark), "--help"], "A test.", Benchmark)
    assert stop.value.code == 0
    output = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert all(f"--{field.name} " in output for field in dataclasses.fields(Benchmark))
    assert "(default: 'ring zigzag' dense)" in output


def test_one_path_or_several_on_the_command_line_and_in_a_file(tmp_path):
    (tmp_path / "c.py").write_text("from ringattn.config import Config\nconfig = Config()\n")

    def data(*words: str) -> Data:
        return config.parse(["--config", str(tmp_path / "c.py"), *words], "").data

    assert data("--data.path", "a").path == Data(path="a").path == Data(path=("a",)).path == "a"
    several = data("--data.path", "a", "b", "--data.mixture", "7", "3")
    assert (several.path, several.paths, several.mixture) == (("a", "b"), ("a", "b"), (7.0, 3.0))
    assert (data().paths, data("--data.mixture", "None").mixture) == (("stdlib",), None)
    run = Config(data=several)
    (tmp_path / "config.json").write_text(config.to_json(run))
    assert config.load(tmp_path / "config.json") == run


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mixture": (1.0, 2.0)}, r"data.mixture=\(1.0, 2.0\) must be one positive number per path of data.path \(1\)"),
        ({"path": ("a", "b"), "mixture": (1.0, -2.0)}, r"data.mixture=\(1.0, -2.0\) must be one positive number"),
        ({"path": ("a", "b"), "mixture": (0.0, 1.0)}, r"data.mixture=\(0.0, 1.0\) must be one positive number"),
        ({"path": ("a", "")}, r"data.path=\('a', ''\) must be"),
        ({"path": ()}, r"data.path=\(\) must be a string or one or more strings"),
        ({"overlap": -1}, r"data.overlap=-1 must be at least 0"),
        ({"overlap": 64, "seq_len": 64}, r"data.overlap=64 must be less than data.seq_len=64"),
        ({"frame_size": (32,)}, r"data.frame_size=\(32,\) must be a height and a width, each a multiple of 4"),
        ({"frame_size": (32, 45)}, r"data.frame_size=\(32, 45\) must be .* such as 32 48"),
    ],
)
def test_invalid_data_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Data(**values)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WordOptions:
    to: Literal["huggingface", "run"] | None = None
    """Kind of target."""


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], "SOURCE TARGET are required, before options (none given)"),
        (["a"], "SOURCE TARGET are required, before options (1 given)"),
        (["a", "b", "c"], "SOURCE TARGET are required, before options (3 given)"),
        (["a", "b", "--too", "run"], "unknown '--too': did you mean '--to'?"),
        (["a", "b", "--to", "onnx"], "--to onnx must be one of 'huggingface', 'run'"),
        (["--to", "run", "a", "b"], "unexpected 'a'"),
    ],
)
def test_a_mistake_in_words(argv, expected, capsys):
    with pytest.raises(SystemExit) as exit_of:
        config.parse_words(WordOptions, ("SOURCE", "TARGET"), argv, "")
    assert exit_of.value.code == 2
    assert expected in capsys.readouterr().err


def test_words_and_options():
    found = config.parse_words(WordOptions, ("SOURCE", "TARGET"), ["a", "b", "--to", "run"], "")
    assert found == (WordOptions(to="run"), ["a", "b"])
    assert config.parse_words(WordOptions, ("SOURCE", "TARGET"), ["a", "b"], "")[0] == WordOptions()
