"""`latent-grpo init` writes a project whose profile, data and verifier fit together, and overwrites nothing."""

from __future__ import annotations

import json
import os
import re
import sys

import pytest
import yaml
from typer.testing import CliRunner

from latent_grpo.common.config import ConfigError
from latent_grpo.deploy.cli.app import app
from latent_grpo.deploy.cli.project import FILES, MADE, make_project
from latent_grpo.reward.testing import check_verifier


@pytest.fixture
def project(tmp_path, importable):
    """A new project, in which the process is, as its user would be."""
    before = os.getcwd()
    make_project(tmp_path / "mine")
    importable(tmp_path / "mine")
    os.chdir(tmp_path / "mine")
    yield tmp_path / "mine"
    os.chdir(before)
    sys.modules.pop("my_verifier", None)


def test_the_profile_is_valid_and_every_file_that_it_names_is_read(project):
    result = CliRunner().invoke(
        app,
        ["validate", "--profile", "train.yaml", "--files", "--allow-plugins", "my_verifier"],
        env={"COLUMNS": "200"},
    )
    assert result.exit_code == 0, result.output
    assert re.search(r"verifier pens\s+│ can be built", result.stdout)
    assert "dropped 200 held out" in result.stdout, "chains are there for Latent-SFT"


def test_the_verifier_keeps_the_contract_and_reads_every_gold(project):
    check_verifier("my_verifier:Pens", correct=[(r"\boxed{7}", "7")], wrong=[(r"\boxed{3}", "7"), ("7", "7")])
    from my_verifier import Pens

    rows = [json.loads(line) for name in MADE for line in (project / name).read_text().splitlines()]
    assert all(Pens().grade(rf"\boxed{{{row['answer']}}}", row["answer"]).reward == 1.0 for row in rows)
    assert Pens(partial=0.25).grade(r"\boxed{6}", "7").reward == 0.25


def test_no_problem_is_in_both_files_and_the_chains_are_right(project):
    training, held_out = ([json.loads(line) for line in (project / name).read_text().splitlines()] for name in MADE)
    assert not {row["problem"] for row in training} & {row["problem"] for row in held_out}
    for row in training:
        for operation in row["cot"].rstrip(";").split(";"):
            left, right = operation.split("=")
            assert eval(left) == int(right)
        assert row["cot"].endswith(f"={row['answer']};")


def test_every_file_is_explained_and_nothing_is_overwritten(project):
    page = (project / "README.md").read_text()
    assert all(name in page for name in (*FILES, *MADE) if name != "README.md")
    assert set(yaml.safe_load((project / "train.yaml").read_text())) >= {"model", "tasks", "warm_start", "verifiers"}
    for name in FILES[1:]:
        (project / name).unlink()
    with pytest.raises(
        ConfigError, match=r"README.md, .*problems.jsonl, .* exists already, and init overwrites nothing"
    ):
        make_project(project)
    assert not (project / "train.yaml").exists()


def test_a_folder_that_cannot_be_written_is_left_as_it_was(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written: Not a directory"):
        make_project(tmp_path / "file" / "mine")
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_the_command_says_what_to_do_next(tmp_path):
    result = CliRunner().invoke(app, ["init", str(tmp_path / "a b")])
    assert result.exit_code == 0, result.output
    assert f"cd '{tmp_path}/a b'\n" in result.stdout
    assert "latent-grpo train --profile train.yaml" in result.stdout
