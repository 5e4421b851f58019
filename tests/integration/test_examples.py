"""The examples do what they show: their profiles are valid, their code keeps the contracts, and a step trains with it.

Runs are made in this process (`deploy.reproduce.in_process`), in the folder of the example, as a reader would.
"""

import csv
import re
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from latent_grpo.common.config import load_config
from latent_grpo.common.metrics import read_metrics
from latent_grpo.common.schema import decode
from latent_grpo.deploy.cli.app import app
from latent_grpo.deploy.reproduce.in_process import InProcessPool, train_in_process
from latent_grpo.deploy.reproduce.scheduler import check
from latent_grpo.deploy.reproduce.unit import Request, run_unit
from latent_grpo.deploy.run.folder import RunFolder
from latent_grpo.deploy.run.foreign_code import named_code
from latent_grpo.deploy.run.progress import Reporter
from latent_grpo.reward.testing import check_verifier
from latent_grpo.reward.verifier import load_verifier

pytestmark = pytest.mark.integration
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SMALL = [
    "steps=1", "prompts_per_step=4", "minibatch_prompts=4", "group_size=4", "optimizer.warmup_steps=0",
    "warm_start.max_steps=2", "warm_start.stop_at=null", "warm_start.batch_size=8", "warm_start.evaluation_problems=4",
    "evaluation.tasks.0.options.size=4",
]  # fmt: skip


@pytest.fixture
def within(monkeypatch):
    """Goes into an example's folder, where its module is found."""
    before = set(sys.modules)

    def enter(name):
        monkeypatch.chdir(EXAMPLES / name)
        monkeypatch.syspath_prepend(str(EXAMPLES / name))

    yield enter
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(EXAMPLES)):
            del sys.modules[name]


def trained(folder, *overrides):
    """A step of the profile of the example that this process is in."""
    folder.mkdir()
    run = RunFolder(folder)
    train_in_process(run, load_config("profile.yaml", [*SMALL, f"runs_folder={folder.parent}", *overrides]), Reporter())
    assert [row["step"] for row in read_metrics(folder)] == [1]
    return run


def test_the_table_names_every_example():
    folders = {path.name for path in EXAMPLES.iterdir() if path.is_dir()}
    linked = re.findall(r"\]\((\w+)/(\w+\.\w+)\)", (EXAMPLES / "README.md").read_text())
    assert {folder for folder, _ in linked} == folders
    assert all((EXAMPLES / folder / file).is_file() for folder, file in linked)


@pytest.mark.parametrize("name", ["own_verifier", "own_task", "own_sink"])
def test_validate_accepts_the_profile_and_imports_what_it_names(within, name):
    within(name)
    modules = ",".join(code.module for code in named_code(load_config("profile.yaml")))
    done = CliRunner().invoke(app, ["validate", "--profile", "profile.yaml", "--allow-plugins", modules])
    assert done.exit_code == 0, done.output
    assert "not checked, since" not in done.output


def test_own_verifier(within, tmp_path, monkeypatch):
    within("own_verifier")
    check_verifier("near_miss:NearMiss", correct=[(r"\boxed{7}", "7")], wrong=[(r"\boxed{6}", "7"), ("7", "7")])
    near = load_verifier("near_miss:NearMiss", partial=0.2)
    assert [near.grade(rf"\boxed{{{given}}}", "7").reward for given in (7, 8, 6, 5)] == [1.0, 0.2, 0.2, 0.0]

    graded, grade = [], InProcessPool._graded  # this runner dumps no trajectories
    keep = lambda *given: graded.append(grade(*given)) or graded[-1]  # noqa: E731
    monkeypatch.setattr(InProcessPool, "_graded", keep)  # as above
    # a defined name (`near`) needs the graders' processes, which this runner does without
    trained(tmp_path / "run", "tasks.0.verifier=near_miss:NearMiss", "verifiers={}")
    rows = [row for batch in graded for row in decode(batch) if row.purpose == "training"]
    own = load_verifier("near_miss:NearMiss")
    assert rows
    assert [row.reward for row in rows] == [own.grade(row.response_text, row.gold_answer).reward for row in rows]


def test_own_task(within, tmp_path):
    within("own_task")
    run = trained(tmp_path / "run")
    assert "shopping-held-out/pass_at_1" in run.read_json("summary.json")["after"]


def test_own_sink(within, tmp_path):
    within("own_sink")
    header, row = csv.reader((trained(tmp_path / "run").path / "curve.csv").open())
    (metrics,) = (line["metrics"] for line in read_metrics(tmp_path / "run"))
    assert (row[0], float(row[header.index("rollout/reward")])) == ("1", metrics["rollout/reward"])


def test_own_suite(within, tmp_path):
    within("own_suite")
    assert "9 units, all settings valid" in check(Request(source="suite.yaml", folder=tmp_path))[0]
    request = Request(source="suite.yaml", folder=tmp_path, quick=True, overrides=SMALL)
    results = [run_unit(request, key) for key in ("latent-seed0", "plain-seed0")]
    assert all(0 <= result.metrics["sampled_pass_at_4"] <= 1 for result in results)
