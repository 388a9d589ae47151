"""The commit in environment.json is that of the project's own checkout, or None."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from ringattn import environment

ROOT = Path(environment.__file__).parents[1]
COMMITTER = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")


def git(directory: Path, *words: str) -> str:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    command = ["git", *COMMITTER, "-C", str(directory), *words]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environ).stdout.strip()


def commit(directory: Path) -> str:
    """Makes `directory` a repository with all its files, and returns its commit."""
    git(directory, "init", "-q")
    git(directory, "add", "-A")
    git(directory, "commit", "-qm", "all", "--no-verify", "--allow-empty")
    return git(directory, "rev-parse", "HEAD")


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A directory of the project's shape inside `tmp_path`, from which ringattn seems to be imported."""
    directory = tmp_path / "outer" / "project"
    (directory / "ringattn").mkdir(parents=True)
    shutil.copy(ROOT / "pyproject.toml", directory)
    source = shutil.copy(environment.__file__, directory / "ringattn")
    monkeypatch.setattr(environment, "__file__", str(source))
    return directory


def test_the_commit_of_the_checkout(project):
    commit_id = commit(project)
    assert environment.git_commit() == commit_id
    with (project / "pyproject.toml").open("a") as file:
        file.write("\n")
    assert environment.git_commit() == f"{commit_id}-dirty"


def test_the_checkout_wins_over_an_enclosing_repository(project):
    inner = commit(project)
    outer = commit(project.parent)
    assert inner != outer
    assert environment.git_commit() == inner


@pytest.mark.parametrize("variable", [None, "GIT_DIR"])
def test_an_enclosing_repository_is_not_named(project, variable, monkeypatch):
    """The project is unpacked in another repository; a hook of that one also sets GIT_DIR."""
    commit(project.parent)
    if variable is not None:
        monkeypatch.setenv(variable, str(project.parent / ".git"))
    assert environment.git_commit() is None


@pytest.mark.parametrize("name", [None, 'name = "other"'], ids=["no pyproject", "another project"])
def test_a_repository_that_contains_the_package_but_is_another_project(project, name):
    """Installed with `pip install --target .`, or copied into another project."""
    (project / "pyproject.toml").unlink()
    if name is not None:
        (project / "pyproject.toml").write_text(f"[project]\n{name}\n")
    commit(project)
    assert environment.git_commit() is None


def test_no_repository_or_no_git(project, monkeypatch):
    assert environment.git_commit() is None
    monkeypatch.setenv("PATH", "")
    assert environment.git_commit() is None
