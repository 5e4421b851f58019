"""A loop that is interrupted ends its running step if the signal leaves the time, and loses nothing whole if not."""

from __future__ import annotations

import io
import json
import re
import signal
import time
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from latent_grpo.common.config import DeadlineConfig
from latent_grpo.common.interrupts import LEAVE_S, Interrupted, sigterm_as_interrupt
from latent_grpo.deploy.cluster import submit
from latent_grpo.deploy.run.progress import Reporter
from latent_grpo.deploy.run.stepping import LearnerSteps, StateKeeper

CLUSTER = Path(submit.__file__).parent


class Ranks:
    """A learner whose step `slow` lasts `seconds`, and in which a signal arrives; the other steps are done at once."""

    def __init__(self, number, slow=3, seconds=0.3, also=()):
        self.number, self.slow, self.seconds, self.also = number, slow, seconds, also
        self.begun, self.whole = 0, 0
        self.ends = 0.0

    def start_step(self):
        self.begun += 1
        is_slow = self.begun == self.slow
        self.ends = time.monotonic() + (self.seconds if is_slow else 0.0)
        if is_slow:
            signal.raise_signal(self.number)

    def finished(self):
        if self.begun == self.slow and self.also:
            signal.raise_signal(self.also[0])
        return time.monotonic() >= self.ends

    def finish_step(self):
        self.whole += 1
        return {"loss": float(self.whole)}


def run(ranks, deadlines, steps=5):
    """A loop that writes a state only where it is told to: what it wrote, recorded and said."""
    console = Console(file=io.StringIO(), width=300, record=True)
    reporter, written, recorded = Reporter(console), [], []
    keeper = StateKeeper("training", 0, written.append, lambda done, values: None, deadlines, reporter)
    loop = LearnerSteps(ranks, 0, lambda done, values: recorded.append((done, values["loss"])), keeper)

    def all_steps():
        with sigterm_as_interrupt(), loop.interruptible(reporter):
            for _ in range(steps):
                loop.start()
                loop.finish()

    with pytest.raises(KeyboardInterrupt) as raised:
        all_steps()
    return written, recorded, console.export_text(), raised.type


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_running_step_ends_is_recorded_and_its_state_is_written(number):
    ranks = Ranks(number)
    written, recorded, said, raised = run(ranks, DeadlineConfig())
    assert (ranks.begun, ranks.whole, written) == (3, 3, [3])
    assert recorded == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert "the checkpoint of training step 3 is complete" in said
    assert raised is Interrupted


def test_ctrl_c_waits_for_as_long_as_the_learner_may_take_whatever_sigterm_leaves():
    ranks = Ranks(signal.SIGINT, seconds=0.5)
    _, recorded, said, _ = run(ranks, DeadlineConfig(terminate_s=0.01, learner_s=77))
    assert len(recorded) == 3
    assert re.search(r"the running step may take 7\d s more \(deadlines.learner_s\)", said)


@pytest.mark.parametrize(
    ("number", "key"), [(signal.SIGINT, "deadlines.settle_s"), (signal.SIGTERM, "deadlines.terminate_s")]
)
def test_a_step_that_outlasts_its_time_is_given_up_and_the_last_whole_one_is_on_the_disk(number, key):
    """Steps are so long for the time that SIGTERM leaves that every state is written."""
    ranks = Ranks(number, seconds=60.0)
    deadlines = DeadlineConfig(settle_s=0.05, terminate_s=1e-9)
    began = time.monotonic()
    written, recorded, said, raised = run(ranks, deadlines)
    assert time.monotonic() - began < 30, "it did not wait for the step"
    assert (written, len(recorded)) == ([1, 2], 2)
    assert f"did not end in time ({key}) and is given up" in said
    assert "the checkpoint of training step 2 is complete" in said
    assert raised is Interrupted


def test_what_a_step_without_a_state_before_it_loses_is_said():
    _, _, said, _ = run(Ranks(signal.SIGINT, seconds=60.0), DeadlineConfig(settle_s=0.05))
    assert "interrupted; not saved: step 1 to 2" in said


def test_a_second_signal_ends_the_wait_at_once():
    ranks = Ranks(signal.SIGINT, seconds=60.0, also=(signal.SIGINT,))
    began = time.monotonic()
    written, recorded, _, raised = run(ranks, DeadlineConfig())
    assert (written, len(recorded)) == ([], 2)
    assert raised is KeyboardInterrupt
    assert time.monotonic() - began < 30


def test_states_are_written_ahead_only_while_steps_are_long():
    """Twice the longest of the last eight steps must fit into the time that SIGTERM leaves.

    The first state is written while half of that time is taken to be its own: 40 s are too long then.
    """
    console = Console(file=io.StringIO(), width=300, record=True)
    written, seconds = [], []
    keeper = StateKeeper(
        "training", 0, written.append, lambda done, values: seconds.append((done, values["seconds"])),
        DeadlineConfig(terminate_s=100), Reporter(console),
    )  # fmt: skip
    for done, took in enumerate([40, 40, 60, *[30] * 9, 30], start=1):
        keeper.took(took)
        keeper.keep_ahead(done)
    assert written == [1, 3, 4, 5, 6, 7, 8, 9, 10], "from the long step on until eight short ones have followed"
    assert [done for done, _ in seconds] == written
    assert all(0 <= value < 1 for _, value in seconds)
    assert console.export_text().count("the state is written after every step") == 1
    keeper.keep(10)
    assert written[-1] == 10, "a state that is there is not written again"
    assert len(written) == 9


@pytest.mark.parametrize(
    ("save", "step", "expected"),
    [
        (None, 20.0, 50.0),  # no state was written yet: half is kept for it
        (None, 60.0, 100.0),  # it is written first, in no time
        (0.5, 0.1, 99.0),
    ],
)
def test_a_step_leaves_its_state_twice_the_time_that_the_last_one_took(save, step, expected):
    """So both end within `deadlines.terminate_s`, which clusters wait for; Ctrl-C has no such end."""

    def write(done):
        time.sleep(save or 0.0)

    keeper = StateKeeper(
        "training", 0, write, lambda done, values: None, DeadlineConfig(terminate_s=100), Reporter(Console(quiet=True))
    )
    if save is not None:
        keeper.keep(1)
    keeper.took(step)
    keeper.keep_ahead(2)
    given = []
    began = time.monotonic()
    keeper.finish_step(Interrupted(signal.SIGTERM, began), given.append)
    assert given == [pytest.approx(expected, abs=0.4)]
    keeper.finish_step(Interrupted(signal.SIGINT, began), given.append)
    assert given[1] == pytest.approx(DeadlineConfig().learner_s, abs=0.4)


def test_no_step_is_waited_for_where_its_state_alone_takes_all_the_time():
    keeper = StateKeeper(
        "training", 0, lambda done: time.sleep(0.2), lambda done, values: None, DeadlineConfig(terminate_s=0.3),
        Reporter(Console(quiet=True)),
    )  # fmt: skip
    keeper.keep(1)
    given = []
    keeper.finish_step(Interrupted(signal.SIGTERM, time.monotonic()), given.append)
    assert given == [0.0]


# --- the machine waits long enough ---------------------------------------------------------------------------------


def test_clusters_wait_as_long_as_a_run_may_take_after_sigterm():
    promised = DeadlineConfig().terminate_s + LEAVE_S
    assert promised == submit.stop_seconds(["train", "--profile", "quickstart"])
    slurm = (CLUSTER / "slurm.sbatch").read_text()
    (before,) = re.findall(r"^#SBATCH --signal=B:USR1@(\d+)$", slurm, re.MULTILINE)
    assert float(before) >= promised + 30  # the job also has to requeue itself
    for name in ("rayjob.yaml", "raycluster.yaml"):
        spec = yaml.safe_load((CLUSTER / name).read_text())["spec"]
        cluster = spec.get("rayClusterSpec", spec)
        pods = [group["template"]["spec"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]
        assert {pod["terminationGracePeriodSeconds"] for pod in pods} == {promised}, name
    job = yaml.safe_load((CLUSTER / "rayjob.yaml").read_text())["spec"]
    in_shell = re.search(r"--runtime-env-json '(.*?)'", (CLUSTER / "submit.sh").read_text())
    for environment in (yaml.safe_load(job["runtimeEnvYAML"]), json.loads(in_shell[1])):
        assert float(environment["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"]) == promised


@pytest.mark.parametrize(
    ("arguments", "seconds"),
    [
        ("train", 100),
        ("train --profile PROFILE", 400),
        ("sft --profile=PROFILE", 400),
        ("train --profile PROFILE deadlines.terminate_s=50 steps=2", 50),
        ("train --profile PROFILE --deadlines.terminate_s 50", 50),
        ("reproduce suite --quick deadlines.terminate_s=50", 50),
        ("train --deadlines.terminate_s=50 deadlines.terminate_s=60.5", 60.5),
        ("train deadlines={terminate_s: 70}", 70),
        ("train --resume RUN", 300),
        ("train --resume RUN deadlines.terminate_s=50", 50),
        ("train --resume /on/the/cluster", 100),
        ("train --profile /on/the/cluster.yaml", 100),
    ],
)
def test_a_stopped_job_has_the_time_that_its_own_settings_say(tmp_path, arguments, seconds):
    profile = tmp_path / "mine.yaml"
    profile.write_text("extends: quickstart\ndeadlines: {terminate_s: 400}\n")
    (tmp_path / "config.json").write_text(json.dumps({"deadlines": {"terminate_s": 300.0, "start_s": 1.0}}))
    paths = {"PROFILE": str(profile), "RUN": str(tmp_path)}
    whole = re.findall(r"\S+=\{.*\}|\S+", re.sub("PROFILE|RUN", lambda found: paths[found[0]], arguments))
    assert submit.stop_seconds(whole) == seconds + LEAVE_S


def test_a_time_that_the_job_would_refuse_is_refused_before_it_is_sent():
    with pytest.raises(submit.SubmitError, match=r"terminate_s: Input should be greater than 0, got -1"):
        submit.stop_seconds(["train", "deadlines.terminate_s=-1"])
