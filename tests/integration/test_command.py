"""The command as a user runs it: killed, interrupted, resumed. Each run is a process of its own with its own Ray."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from training import PROFILE

from latent_grpo.common.config import NewModelConfig
from latent_grpo.common.metrics import read_metrics
from latent_grpo.common.models import make_model, save_model
from latent_grpo.common.store import TrajectoryStore
from latent_grpo.common.tasks.arithmetic import make_arithmetic_tokenizer
from latent_grpo.learner.checkpoint import latest_checkpoint

pytestmark = pytest.mark.integration
ROOT = Path(__file__).resolve().parents[2]
INTERRUPT_S = 30  # what the product promises of a machine that has time for it
BUSY_S = 60  # what a test grants on top, so that a busy machine is no failure


def start(environment, log, *arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "deploy", "train", *arguments],
        cwd=ROOT, env=environment, stdout=log.open("wb"), stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip


def wait_for(condition, what, process, log, timeout=300):
    end = time.monotonic() + timeout
    while not (found := condition()):
        assert process.poll() is None, f"ended with {process.returncode}:\n{log.read_text()}"
        assert time.monotonic() < end, f"{what} not seen after {timeout} s:\n{log.read_text()}"
        time.sleep(0.1)
    return found


def family(process):
    return psutil.Process(process.pid).children(recursive=True)


def command_line(process):
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:  # it has just ended
        return ""


def runs_on(process):
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def left_of(processes, timeout):
    _, alive = psutil.wait_procs(processes, timeout)
    return [p for p in alive if runs_on(p)]


def steps_done(folder):
    path = folder / "metrics.jsonl"
    return len([line for line in path.read_text().splitlines() if '"train"' in line]) if path.exists() else 0


def test_damaged_weights_are_one_line_and_leave_no_run(environment, tmp_path):
    model = make_model(NewModelConfig(**PROFILE["model"]["new"]), make_arithmetic_tokenizer(), seed=0)
    model.get_output_embeddings().weight.data.fill_(torch.nan)
    save_model(tmp_path / "m", model, make_arithmetic_tokenizer())
    profile, runs = tmp_path / "p.yaml", tmp_path / "runs"
    profile.write_text(yaml.safe_dump(PROFILE | {"model": {"path": str(tmp_path / "m")}, "runs_folder": str(runs)}))
    command = [sys.executable, "-m", "deploy", "train", "--profile", str(profile)]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 2, ended.stderr
    (line,) = ended.stderr.splitlines()
    assert "its logits are not finite, so its weights are damaged" in line
    assert list(runs.iterdir()) == []


def test_a_killed_learner_is_named_and_an_interrupt_keeps_its_checkpoint(environment, tmp_path):
    profile, runs, log = tmp_path / "tiny.yaml", tmp_path / "runs", tmp_path / "log"
    profile.write_text(yaml.safe_dump({**PROFILE, "steps": 100_000, "runs_folder": str(runs), "evaluation": {}}))

    process = start(environment, log, "--profile", str(profile), "max_recoveries=0")
    wait_for(lambda: list(runs.glob("tiny-*")), "run folder", process, log)
    (folder,) = runs.iterdir()
    wait_for(lambda: steps_done(folder) >= 3, "three steps", process, log)
    processes = family(process)
    (learner,) = [p for p in processes if "LearnerRank" in command_line(p)]
    learner.send_signal(signal.SIGKILL)
    assert process.wait(300) == 1, log.read_text()
    assert "learner rank 0 died" in log.read_text()
    assert f"`latent-grpo train --resume {folder}` continues from the last checkpoint" in log.read_text()
    assert "Traceback" not in log.read_text()
    assert not left_of(processes, INTERRUPT_S + BUSY_S)
    kept = latest_checkpoint(folder / "checkpoints")
    assert kept.step >= 2

    process = start(environment, log, "--resume", str(folder), "checkpoint.every=0")
    wait_for(lambda: steps_done(folder) >= kept.step + 3, "more steps", process, log)
    processes = family(process)
    end = time.monotonic() + INTERRUPT_S + BUSY_S
    process.send_signal(signal.SIGTERM)  # as a job that is stopped; Ctrl-C of a command: test_reproduce
    assert process.wait(INTERRUPT_S + BUSY_S) == 130, log.read_text()
    assert not left_of(processes, max(5.0, end - time.monotonic()))
    last = latest_checkpoint(folder / "checkpoints")
    live = list(read_metrics(folder))
    assert last.step == live[-1]["step"] > kept.step, "the interrupt saved what was trained"
    assert TrajectoryStore(folder / "trajectories").steps()[-1] == last.step
    assert f"the checkpoint of training step {last.step} is complete" in log.read_text()

    assert {row["lineage"] for row in live} == {0, 1}
    assert [row["step"] for row in live] == list(range(1, len(live) + 1))
    assert json.loads((folder / "run.json").read_text())["lineage"] == 1
