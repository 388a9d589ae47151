"""A fixed selection of the cases of `fuzz.py`, in this process; the slow test runs the command."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from fuzz_configs import config_case, shallow
from fuzz_files import SUBJECTS, expected, file_case
from fuzz_fixtures import make_fixtures
from fuzz_outcome import Outcome, judge

KINDS = ("text", "compressed", "shards", "tokenizer", "codebook", "huggingface", "gguf")
"""Kinds of files that need no trained run."""


@pytest.fixture(scope="module")
def fixtures(tmp_path_factory) -> Path:
    base = make_fixtures(tmp_path_factory.mktemp("intact"), run=False)
    (base / "expected.json").write_text(json.dumps(expected(base, base / "work", all_subjects=False)))
    return base


@pytest.mark.parametrize(("kind", "cases"), [("options", 6), ("combinations", 6), ("json", 24), ("python", 12)])
@pytest.mark.usefixtures("unchecked")
def test_mutated_configs_are_accepted_or_refused_in_one_line(kind, cases, fixtures, tmp_path):
    statuses = []
    for number in range(cases):
        directory = tmp_path / str(number)
        directory.mkdir()
        with shallow():
            case, outcome = config_case(random.Random(f"{number}"), directory, fixtures, kind, real=0)
        assert outcome.status != "finding", (case.said, outcome.message)
        statuses.append(outcome.status)
    assert "refused" in statuses


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("unchecked")
def test_mutated_files_are_read_or_refused_in_one_line(kind, fixtures, tmp_path):
    for number in range(4):
        directory = tmp_path / str(number)
        directory.mkdir()
        _, said, outcome = file_case(random.Random(f"{number}"), directory, fixtures, kind)
        assert outcome.status != "finding", (said, outcome.message)


def test_every_other_end_of_a_case_is_a_finding():
    def fail(error: BaseException):
        raise error

    assert judge(lambda: None) == Outcome("accepted")
    assert judge(lambda: fail(SystemExit(0))).status == "accepted"
    assert judge(lambda: fail(KeyError("a"))).status == "finding"
    assert judge(lambda: fail(SystemExit(3))).status == "finding"
    assert judge(lambda: fail(SystemExit(2))).status == "finding"  # without a message
    assert judge(lambda: int("x")).status == "finding"  # the message names no field


@pytest.mark.slow
def test_the_command_finds_nothing(tmp_path):
    command = [
        sys.executable,
        str(Path(__file__).with_name("fuzz.py")),
        "--cases",
        "50",
        "--files",
        "40",
        "--seed",
        "1",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    kinds = {
        line.partition(":")[2].split("  ")[0].strip() for line in done.stdout.splitlines() if line.startswith("file")
    }
    assert kinds <= set(SUBJECTS)
    assert len(kinds) > len(SUBJECTS) // 2
