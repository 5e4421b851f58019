"""Runs that are no RL: a Latent-SFT and an evaluation are shown as what they are, finished or not."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from fake_run import fake_config, fake_trajectory
from rich.console import Console

from latent_grpo.common.config import ConfigError, config_as_json
from latent_grpo.common.metrics import MetricsWriter
from latent_grpo.common.schema import encode
from latent_grpo.common.store import TrajectoryStore
from latent_grpo.deploy import train as training
from latent_grpo.deploy.run.folder import RunFolder, create_run
from latent_grpo.deploy.run.progress import Reporter
from latent_grpo.deploy.run.stored import EVALUATION_FILE
from latent_grpo.deploy.sft.loop import resume_sft
from latent_grpo.deploy.view.inspect import inspect, overview_json
from latent_grpo.deploy.view.report.curves import charts
from latent_grpo.deploy.view.run_view import open_run
from latent_grpo.deploy.view.selection import Filters

WARM_START = {"compression": 3, "max_steps": 40, "evaluate_every": 10}


def fake_sft(path, *, finished: bool) -> RunFolder:
    """A Latent-SFT of which twelve steps and one evaluation of four samples are recorded."""
    folder = create_run(fake_config(warm_start=WARM_START), "sft", path, kind="sft")
    rng = np.random.default_rng(0)
    with MetricsWriter(path) as metrics:
        for step in range(1, 13):
            losses = {"loss": 5.0 / step, "kl": 4.0 / step, "cross_entropy": 1.0 / step, "grad_norm": 1.0}
            metrics.write(step, losses, kind="sft")
        held_out = {
            "pass_at_1": 0.25, "standard_error": 0.1, "chain_length": 6.5, "latent_length": 3.5, "invalid_rate": 0.25,
            "failed_wrong": 0.5, "failed_no_answer": 0.25,
        }  # fmt: skip
        metrics.write(10, held_out, kind="sft_evaluation")
    rewards = ((1.0, None), (0.0, "wrong"), (0.0, "wrong"), (0.0, "no_answer"))
    samples = [
        fake_trajectory(rng, step=1, group=i, index=0, reward=reward, reason=reason)
        for i, (reward, reason) in enumerate(rewards)
    ]
    TrajectoryStore(folder.trajectories).write(10, encode(samples, 3), "sft", 0)
    if finished:
        folder.base_model.mkdir()
        (folder.base_model / "config.json").write_text("{}")
    return folder


def shown(folder, filters=None, **options) -> str:
    console = Console(file=io.StringIO(), width=160, force_terminal=False)
    inspect(open_run(folder.path), filters or Filters(), console=console, **options)
    return console.file.getvalue()


@pytest.mark.parametrize(
    ("finished", "state"),
    [
        (True, "finished after 12 steps of Latent-SFT"),
        (False, "unfinished: 12 of 40 steps of Latent-SFT recorded so far"),
    ],
)
def test_a_latent_sft_is_shown_as_one(tmp_path, finished, state):
    folder = fake_sft(tmp_path / "run", finished=finished)
    run = open_run(folder.path)
    assert (run.state, run.finished) == (state, finished)
    text = shown(folder)
    assert state in text
    assert "held-out pass@1 0.250 at step 10" in " ".join(text.split())
    (row,) = [line for line in text.splitlines() if line.strip().startswith("10 ")]
    assert " ".join(row.split()) == "10 0.500 0.400 0.100 0.250 6.5 3.5 25.0% wrong 50%, no answer 25% 4"
    assert "no step has been recorded" not in text


def test_held_out_samples_are_listed_and_read(tmp_path):
    folder = fake_sft(tmp_path / "run", finished=True)
    listed = shown(folder, Filters(purpose="sft", failed=True))
    assert listed.count("10 sft") == 3
    assert "chains/1" in shown(folder, Filters(purpose="sft", problem="chains/1"), show=1)
    found = overview_json(open_run(folder.path))["sft"]
    assert [(step["step"], step["dumped"]) for step in found] == [(10, 4), (12, 0)]
    assert found[0]["metrics"]["failed_wrong"] == 0.5


def test_the_report_draws_both_losses_and_the_held_out_figures(tmp_path):
    found = {chart["title"]: chart for chart in charts(open_run(fake_sft(tmp_path / "run", finished=True).path))}
    assert list(found) == [f"Latent-SFT: {name}" for name in ("loss", "held-out pass@1", "chain length", "grades")]
    assert [s["name"] for s in found["Latent-SFT: loss"]["series"]] == [
        "loss", "KL (latent steps)", "cross-entropy (text)"
    ]  # fmt: skip
    grades = {s["name"]: s["y"] for s in found["Latent-SFT: grades"]["series"]}
    assert grades == {"correct": [0.25], "wrong": [0.5], "no answer": [0.25]}


@pytest.mark.parametrize("stated", [True, False], ids=["stated", "of-an-earlier-version"])
def test_an_evaluation_is_shown_as_one(tmp_path, stated):
    path = tmp_path / "run"
    folder = create_run(fake_config(), "evaluate-x", path, kind="evaluate")
    assert open_run(path).state == "unfinished evaluation: no results yet"
    assert "the evaluation has no results yet" in shown(folder)
    task = {"task": "gsm8k", "pass_at_1": 0.5, "chain_length": 9.0, "latent_length": 5.0, "invalid_rate": 0.0}
    folder.write_json(EVALUATION_FILE, {"tasks": [task | {"problems": 1319, "samples": 6595}]})
    if not stated:
        folder.write_json("run.json", {"lineage": 0})
    assert (open_run(path).state, open_run(path).finished) == ("finished evaluation", True)
    text = " ".join(shown(folder).split())
    assert "gsm8k 0.500 9.0 5.0 0.0% 1,319 6,595 ours" in text
    assert "pass@1 gsm8k 0.500 (protocol ours)" in text


@pytest.mark.parametrize(
    ("command", "kind"), [(training.resume, "train"), (resume_sft, "sft")], ids=["train --resume", "sft --resume"]
)
@pytest.mark.parametrize("stored", [{"kind": "sft"}, {"kind": "train"}, {}], ids=["sft", "train", "of 0.2.0"])
def test_the_command_that_resumes_a_run_says_what_it_is_from_now_on(tmp_path, command, kind, stored):
    """Its model is gone, so that the command ends once the run is reopened."""
    folder = fake_sft(tmp_path / "run", finished=False)
    settings = fake_config(warm_start=WARM_START, model={"path": str(tmp_path / "gone")})
    (folder.path / "config.json").write_text(config_as_json(settings))
    folder.write_json("run.json", {"lineage": 0, **stored})
    with pytest.raises(ConfigError):
        command(folder.path, [], Reporter(Console(quiet=True)))
    identity = json.loads((folder.path / "run.json").read_text())
    assert (identity["kind"], identity["lineage"]) == (kind, 1)


def test_a_start_that_was_given_is_finished_when_it_is_evaluated(tmp_path):
    folder = create_run(fake_config(warm_start=None), "start", tmp_path / "run", kind="sft")
    assert not open_run(folder.path).finished
    folder.write_json("summary.json", {"after": {"e/pass_at_1": 0.5}})
    assert open_run(folder.path).finished
