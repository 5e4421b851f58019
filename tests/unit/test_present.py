"""The authors' own files do where a profile's files are missing, and no other file is taken for one."""

from __future__ import annotations

import json

import pytest

from latent_grpo.common.config import load_config
from latent_grpo.common.tasks.benchmarks import known_files
from latent_grpo.common.tasks.present import with_present_files
from latent_grpo.common.tasks.sources import load_task
from latent_grpo.deploy.data.sets import SETS
from latent_grpo.deploy.evaluation.evaluate import evaluation_config


def config_of(folder, name: str = "gsm8k_aug_oss_dup_all.parquet"):
    """The profile with all files in a folder."""
    files = {"tasks.0": name, "evaluation.tasks.2": "svamp.parquet"}
    return load_config("paper-low", [f"{task}.path={folder / file}" for task, file in files.items()])


def test_a_missing_file_is_looked_for_under_the_authors_name(tmp_path):
    config = config_of(tmp_path)
    assert with_present_files(config) == config, "nothing is there"
    row = {"problem": "2+3?", "cot": "<<2+3=5>>", "cot_answer": "It is \\boxed{5}."}
    (tmp_path / "GSM8k-Aug-oss-dup-all.jsonl").write_text(json.dumps(row))
    (tmp_path / "Svamp-test.parquet").touch()
    found = with_present_files(config)
    assert found.tasks[0].path == str(tmp_path / "GSM8k-Aug-oss-dup-all.jsonl")
    assert found.evaluation.tasks[2].path == str(tmp_path / "Svamp-test.parquet")
    assert found.evaluation.tasks[0] == config.evaluation.tasks[0]
    problem = load_task(found.tasks[0], 0, boxed=lambda text: "5" if "boxed" in text else None).problem(0)
    assert (problem.answer, problem.solution) == ("5", "It is \\boxed{5}.")
    plan = evaluation_config(str(tmp_path), [f"evaluation.tasks.2.path={tmp_path}/svamp.parquet"], profile="paper-low")
    assert plan.config.evaluation.tasks[2].path == found.evaluation.tasks[2].path


def test_a_file_that_is_there_or_has_a_name_of_its_own_stays(tmp_path):
    (tmp_path / "GSM8k-Aug-oss-dup-all.parquet").touch()
    mine = config_of(tmp_path, "mine.parquet")
    assert with_present_files(mine) == mine
    (tmp_path / "gsm8k_aug_oss_dup_all.parquet").touch()
    assert with_present_files(config_of(tmp_path)).tasks[0].path == str(tmp_path / "gsm8k_aug_oss_dup_all.parquet")


@pytest.mark.parametrize("name", SETS)
def test_every_set_is_known_under_the_names_that_fetch_knows(name):
    assert known_files(name)[0] == SETS[name].file
    assert set(SETS[name].authors_files) <= set(known_files(name))
