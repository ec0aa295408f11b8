"""What make itself tells, with programs that do nothing in place of pip and dvc."""

import os
import shutil
import subprocess

import pytest
import yaml

from tests.layout import ROOT


@pytest.fixture
def make(tmp_path):
    """The Makefile beside a .venv whose programs leave `dvc exp remove` as the only one that fails."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("requirements.txt", "requirements-dev.txt", "constraints.txt"):
        (tmp_path / name).touch()
    (tmp_path / ".venv/bin").mkdir(parents=True)
    for name in ("python", "pip", "dvc"):
        program = tmp_path / ".venv/bin" / name
        program.write_text(f'#!/bin/sh\necho {name} "$@" >> called\ntest "$1 $2" != "exp remove"\n')
        program.chmod(0o755)
    plain = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    return lambda *arguments: subprocess.run(["make", *arguments], cwd=tmp_path, env=plain, capture_output=True, text=True, check=False)


def test_the_first_quick_run_has_no_experiment_to_remove_and_no_error(make):
    done = make("quick")
    assert done.returncode == 0 and done.stderr == "" and "exp run --temp --name quick" in done.stdout


def test_every_installation_is_told_before_it_begins(make):
    lines = make("lint").stdout.splitlines()
    installed = [at for at, line in enumerate(lines) if line.startswith("pip install")]
    assert installed and all(lines[at - 1].startswith("installing ") and "minute" in lines[at - 1] for at in installed)


@pytest.mark.parametrize("given, asked", [
    ("pr-comment", "stages.pr_comment main"), ("pr-comment BASE=v2", "stages.pr_comment v2"),
    ("gate", "stages.gate"), ("gate BASE=v2", "stages.gate --base v2")])
def test_what_is_compared_is_what_base_names(make, tmp_path, given, asked):
    assert make(*given.split()).returncode == 0
    assert (tmp_path / "called").read_text().splitlines()[-1] == f"python -m {asked}"


def test_what_the_workflow_makes_there_is(make):
    jobs = yaml.safe_load((ROOT / ".github/workflows/pull-request.yml").read_text(encoding="utf-8"))["jobs"]
    lines = [line.split() for job in jobs.values() for step in job["steps"] for line in step.get("run", "").splitlines()]
    targets = {words[1] for words in lines if words and words[0] == "make"}
    assert targets == {"install", "test"}
    for target in targets:
        done = make(target)
        assert done.returncode == 0, done.stderr
