"""A run with one damaged file is resumed on a real Ray: it goes on, or ends with one line, and loses nothing."""

import contextlib
import io
import os
import shutil
from pathlib import Path

import pytest
from damage import DAMAGE
from training import COMMON, tiny

from latent_grpo.common.metrics import read_metrics
from latent_grpo.deploy.cli.app import run_command
from latent_grpo.deploy.run import link
from latent_grpo.deploy.train import train

pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
]  # tests/unit/test_damaged_runs.py stops before Ray
QUIET = ("evaluation.at_start=false", "evaluation.at_end=false", "checkpoint.every=1", "steps=3")
LAST = "checkpoints/*-step-000003"
FILES = (
    "config.json", "run.json", "manifest.json", "metrics.jsonl", "alarms.jsonl", "summary.json", "base/config.json",
    "base/model.safetensors", "base/tokenizer.json", f"{LAST}/MANIFEST.json", f"{LAST}/state.json",
    f"{LAST}/learner/learner.json", f"{LAST}/learner/00000.safetensors", "trajectories/training/step=3/*",
    "learner_records/training/step=3/*",
)  # fmt: skip
OF_THE_SESSION = {"config.json", "run.json", "manifest.json", "metrics.jsonl", "alarms.jsonl", "summary.json"}


@pytest.fixture(scope="module")
def stopped(ray_session, tmp_path_factory) -> Path:
    """Three steps with a checkpoint each, of which two are left; its model is taken away, so that it can go on."""
    folder = train(tiny(*COMMON, *QUIET, f"runs_folder={tmp_path_factory.mktemp('stopped')}"), "stopped")
    shutil.rmtree(folder.model)
    (folder.path / "report.html").unlink()
    return folder.path


def contents(folder: Path) -> dict[str, bytes]:
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if not name.startswith(".")}


@pytest.mark.parametrize("how", ["removed", "cut", "flipped", "a list", "a folder"])
@pytest.mark.parametrize("file", FILES)
def test_a_resume_goes_on_or_says_why_not(stopped, tmp_path, monkeypatch, file, how):
    monkeypatch.setenv(link.PIPES, "unused")  # in this process, without a supervisor
    run = tmp_path / "r"
    shutil.copytree(stopped, run)
    (place,) = run.glob(file)
    DAMAGE[how](place)
    before, said = contents(run), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = run_command(["train", "--resume", str(run), "steps=4"])
    text = said.getvalue()
    assert "traceback" not in text.lower(), text
    if code:
        assert code in (1, 2), text
        assert sum(line.startswith("error ") for line in text.splitlines()) == 1, text
        after = contents(run)
        assert {name for name in before if before[name] != after.get(name)} <= OF_THE_SESSION, text
    else:
        assert (run / "model" / "config.json").is_file()
        assert [row["step"] for row in read_metrics(run)][-1] == 4
    if file.startswith("checkpoints"):
        assert code == 0, text
        assert "skipped: " in text
    assert not os.path.lexists(run / ".lease"), "the folder is free again"
