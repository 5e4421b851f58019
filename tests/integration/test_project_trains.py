"""A project of `latent-grpo init` trains at once, with the commands that its README shows."""

import subprocess
import sys

import pytest

from latent_grpo.common.metrics import read_metrics
from latent_grpo.deploy.cli.project import make_project

pytestmark = [pytest.mark.integration, pytest.mark.slow]  # quick: tests/unit/test_project.py validates it


def test_a_new_project_learns_its_task(environment, tmp_path):
    make_project(tmp_path / "mine")

    def command(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "latent_grpo.deploy", *arguments],
            cwd=tmp_path / "mine", env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip

    golds = command("grade", "problems.jsonl", "--golds", "--kind", "pens", "--profile", "train.yaml")
    assert golds.returncode == 0, golds.stdout + golds.stderr
    trained = command("train", "--profile", "train.yaml", "steps=4")
    assert trained.returncode == 0, trained.stdout + trained.stderr
    (run,) = (tmp_path / "mine" / "runs").iterdir()
    assert [row["step"] for row in read_metrics(run)] == [1, 2, 3, 4]
    scores = [row["metrics"]["pass_at_1"] for row in read_metrics(run, kind="sft_evaluation")]
    assert max(scores) > 0.4, "Latent-SFT has taught it: guessing is right in a tenth of the problems"
    answer = command("generate", "--model", str(run / "model"), "--prompt", "Mia has 3 pens, gets 4, gives 2?")
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert "boxed" in answer.stdout
    assert "finished" in command("status").stdout
