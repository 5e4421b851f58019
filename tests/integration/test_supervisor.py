"""A run whose controller or Ray is killed or stands still goes on by itself and ends as the undisturbed one."""

import json
import signal
import time

import psutil
import pytest
import torch
import yaml
from test_command import command_line, family, left_of, start, steps_done, wait_for
from test_train import rows_of, weights_of
from training import COMMON, PROFILE

from latent_grpo.common.metrics import read_metrics
from latent_grpo.deploy.run.folder import RunFolder

pytestmark = pytest.mark.integration
QUIET = ("evaluation.at_start=false", "evaluation.at_end=false", "checkpoint.every=2", "steps=6")


def begun(environment, tmp_path, *overrides):
    """Starts the run of `whole` as a command, and waits until three steps are done."""
    profile, runs, log = tmp_path / "tiny.yaml", tmp_path / "runs", tmp_path / "log"
    profile.write_text(yaml.safe_dump(PROFILE))
    settings = (*COMMON, *QUIET, f"runs_folder={runs}", *overrides)
    process = start(environment, log, "--profile", str(profile), *settings)
    wait_for(lambda: list(runs.glob("tiny-*")), "run folder", process, log)
    (folder,) = runs.iterdir()
    wait_for(lambda: steps_done(folder) >= 3, "three steps", process, log)
    return process, folder, log


def controller_of(process):
    (child,) = psutil.Process(process.pid).children()
    return child


def process_named(process, name):
    (found,) = [p for p in family(process) if name in command_line(p)]
    return found


def assert_ended_as(whole, process, folder, log, cause):
    assert process.wait(600) == 0, log.read_text()
    said = log.read_text()
    assert cause in said
    assert "recovered within" in said
    assert "Traceback" not in said
    run = RunFolder(folder)
    assert [row["step"] for row in read_metrics(folder)] == list(range(1, 7))
    assert rows_of(run, range(1, 7)) == rows_of(whole, range(1, 7))
    expected, found = weights_of(whole), weights_of(run)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    (recovery,) = [json.loads(line) for line in (folder / "recoveries.jsonl").read_text().splitlines()]
    assert cause in recovery["cause"]


@pytest.mark.slow  # as are the others here: each starts the command twice; test_recovery recovers in one process
def test_a_killed_controller_is_started_again_and_the_end_is_the_same(whole, environment, tmp_path):
    process, folder, log = begun(environment, tmp_path)
    processes = family(process)
    controller_of(process).kill()
    assert_ended_as(whole, process, folder, log, "was killed by SIGKILL")
    assert not left_of(processes, 60)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "number", "cause"),
    [
        ("", signal.SIGSTOP, "gave no sign of life"),
        ("raylet/raylet", signal.SIGKILL, "the run's controller"),
        ("gcs_server", signal.SIGKILL, "the run's controller"),
        ("raylet/raylet", signal.SIGSTOP, "has lost its Ray"),
        ("gcs_server", signal.SIGSTOP, "has lost its Ray"),
    ],
)
def test_a_stopped_controller_and_a_lost_ray_are_recovered_from(whole, environment, tmp_path, name, number, cause):
    limits = ("deadlines.driver_s=10", "deadlines.learner_s=20", "deadlines.rollout_s=20", "deadlines.weights_s=20")
    process, folder, log = begun(environment, tmp_path, *limits)
    victim = process_named(process, name) if name else controller_of(process)
    victim.send_signal(number)
    assert_ended_as(whole, process, folder, log, cause)


@pytest.mark.slow  # tests/unit/test_started_again.py has the same with a controller that does nothing else
def test_a_loop_that_hangs_in_a_sink_is_started_again_though_its_process_beats(whole, environment, tmp_path):
    process, folder, log = begun(environment, tmp_path, "metrics.sinks=[training:HangingSink]", "deadlines.loop_s=20")
    assert_ended_as(whole, process, folder, log, "did nothing but one thing")
    assert "training.py" in log.read_text(), "its stacks name the place"


@pytest.mark.slow
def test_a_supervisor_that_is_stopped_for_longer_than_its_deadline_is_no_fault_of_the_controller(
    whole, environment, tmp_path
):
    process, folder, log = begun(environment, tmp_path, "deadlines.driver_s=5")
    controller = controller_of(process)
    process.send_signal(signal.SIGSTOP)
    controller.send_signal(signal.SIGSTOP)  # else the run would be over before
    time.sleep(8)
    process.send_signal(signal.SIGCONT)
    controller.send_signal(signal.SIGCONT)
    assert process.wait(600) == 0, log.read_text()
    assert not (folder / "recoveries.jsonl").exists(), log.read_text()
    run = RunFolder(folder)
    assert rows_of(run, range(1, 7)) == rows_of(whole, range(1, 7))


@pytest.mark.slow
def test_a_run_whose_supervisor_is_killed_saves_its_state_and_ends(environment, tmp_path):
    endless = ("steps=100000", "checkpoint.every=0", "dynamic_sampling=drop")
    process, folder, log = begun(environment, tmp_path, *endless)
    processes = family(process)
    process.kill()
    process.wait()
    assert not left_of(processes, 90)
    done = steps_done(folder)
    assert list((folder / "checkpoints").glob(f"*-step-{done:06d}")), log.read_text()
