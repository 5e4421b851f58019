"""The short commands of docs/tutorial.md work as they stand there; the slow test of the same name runs all of them."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

import pytest
from fake_run import fake_run
from page_commands import commands

from latent_grpo.deploy.cli.app import run_command
from latent_grpo.deploy.cli.project import make_project

PAGE = Path(__file__).resolve().parents[2] / "docs" / "tutorial.md"
ALL = [shlex.split(line) for line in commands(PAGE)]
OURS = [line for line in ALL if line[0] == "latent-grpo"]
LONG = ("train", "generate", "evaluate", "submit", "grade", "doctor")  # start processes, a model, or Ray
NEEDS_A_MODEL = "model.path=runs/first/model"
SHORT = [line for line in OURS if line[1] not in (*LONG, "init") and NEEDS_A_MODEL not in line]
OTHERS = (["make", "demo"], ["cd", "first-project"], ["ray", "stop"])


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A project with two runs, in which the process is, as the tutorial's reader would be."""
    before, folder = os.getcwd(), tmp_path_factory.mktemp("tutorial") / "first-project"
    make_project(folder)
    fake_run(folder / "runs" / "first", steps=10)
    fake_run(folder / "runs" / "second", steps=10, seed=1)
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))
    sys.modules.pop("my_verifier", None)
    os.chdir(before)


@pytest.mark.parametrize("line", SHORT, ids=" ".join)
def test_a_short_command_works(project, line, capsys):
    assert run_command(line[1:]) == 0, capsys.readouterr().err


def test_every_command_is_run_here_or_in_the_slow_test():
    """What is not run here is run there: the long ones, and those around them."""
    known = [
        line for line in ALL if line[0] in ("latent-grpo", "export") or line in OTHERS or line[:2] == ["ray", "start"]
    ]
    assert known == ALL
    assert len(SHORT) >= 12
    assert {line[1] for line in OURS} >= {"init", "validate", "train", "status", "inspect", "report", "grade", "submit"}
