"""A run that version 0.1.0 made (without its weights) is still read: settings, manifest, dumps, inspect, report.

Its settings name a verifier and a sink by the import paths of then. It was made with
`train --profile quickstart steps=2 ... tasks.0.verifier=reward.answers:NumberVerifier`.
"""

import io
import json
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from latent_grpo.common.config import ConfigError, config_as_json, load_config
from latent_grpo.common.metrics import read_metrics
from latent_grpo.common.schema import decode
from latent_grpo.common.store import TrajectoryStore
from latent_grpo.deploy.run.folder import RunFolder
from latent_grpo.deploy.run.manifest import read_manifest
from latent_grpo.deploy.view.inspect import inspect
from latent_grpo.deploy.view.report.build import write_report
from latent_grpo.deploy.view.run_view import open_run
from latent_grpo.deploy.view.selection import Filters
from latent_grpo.rollout_workers.verifiers import build_verifier


@pytest.fixture
def run(tmp_path):
    kept = Path(__file__).parent / "runs" / "quickstart-of-0.1.0"
    shutil.copytree(kept, tmp_path / kept.name)
    return tmp_path / kept.name


def test_its_settings_records_and_manifest_are_read(run):
    config = RunFolder(run).config()
    assert (config.steps, config.tasks[0].verifier) == (2, "reward.answers:NumberVerifier")
    assert [row["step"] for row in read_metrics(run)] == [1, 2]
    assert read_manifest(run).lineages[0].versions["latent-grpo"] == "0.1.0"
    trajectories = decode(TrajectoryStore(run / "trajectories").read(2))
    assert len(trajectories) == 16
    assert {t.policy_version_min for t in trajectories} == {1}


def test_a_limit_that_every_old_run_had_is_no_choice_and_loosens_no_self_test(run):
    path = run / "config.json"
    stored = json.loads(path.read_text())
    assert stored["health"]["max_log_prob_gap"] == 0.05
    assert RunFolder(run).config().health.max_log_prob_gap == "auto"
    path.write_text(json.dumps(stored | {"health": {"max_log_prob_gap": 0.2}}))
    assert RunFolder(run).config().health.max_log_prob_gap == 0.2, "another number was set by somebody"
    today = load_config(RunFolder(run).config().model_dump(mode="json"), ["health.max_log_prob_gap=0.05"])
    path.write_text(config_as_json(today))
    assert RunFolder(run).config().health.max_log_prob_gap == 0.05, "today's runs have auto unless it is set"


def test_prompt_keys_that_every_old_run_wrote_are_no_choice(run):
    """Written out, a default would take precedence over a benchmark's text."""
    path = run / "config.json"
    stored = json.loads(path.read_text())
    assert set(stored["model"]["prompt"]) >= {"system", "user", "think_start", "think_end"}
    stored["tasks"][0]["prompt"] = {**stored["model"]["prompt"], "system": "Think."}
    path.write_text(json.dumps(stored))
    config = RunFolder(run).config()
    assert (config.model.prompt.given, config.tasks[0].prompt.given) == ({}, {"system": "Think."})


def test_inspect_and_report_show_it(run):
    console = Console(file=io.StringIO(), width=120, force_terminal=False)
    inspect(open_run(run), Filters(), console=console)
    assert "finished after 2 steps" in console.file.getvalue()
    page = write_report(open_run(run)).read_text(encoding="utf-8")
    assert "quickstart-of-0.1.0 · latent-grpo report" in page


def test_going_on_with_it_is_answered_with_the_import_path_of_today(run):
    config = RunFolder(run).config()
    with pytest.raises(ConfigError, match=r"'latent_grpo\.reward\.answers:NumberVerifier'"):
        build_verifier(config, config.tasks[0].verifier)
