"""A run that loses a learner rank goes on by itself and ends as the undisturbed one does, bit for bit."""

import contextlib
import io
import json
import signal
import threading
import time

import psutil
import pytest
import torch
from rich.console import Console
from test_command import command_line
from test_train import rows_of, weights_of
from training import COMMON, tiny

from latent_grpo.common.errors import RunError
from latent_grpo.common.metrics import read_metrics
from latent_grpo.deploy.run.progress import Reporter
from latent_grpo.deploy.run.ray_session import ray_session as session
from latent_grpo.deploy.train import train

pytestmark = pytest.mark.integration
QUIET = ("evaluation.at_start=false", "evaluation.at_end=false", "checkpoint.every=2", "steps=6")


def actors(name):
    return [p for p in psutil.Process().children(recursive=True) if name in command_line(p)]


class Killing(Reporter):
    """Sends a signal to the learner's rank once `after` steps are done; with `again` in every later lineage too.

    Notes the processes of the workers then, and those at the end.
    """

    def __init__(self, after, number, again=False):
        super().__init__(Console(file=io.StringIO(), width=300, record=True))
        self.after, self.number, self.again, self.done = after, number, again, False
        self.workers = []

    @contextlib.contextmanager
    def phase(self, name, total, unit="steps"):
        armed = not self.done or self.again

        def advance(completed, note=""):
            nonlocal armed
            if name == "latent_grpo" and completed >= self.after and armed:
                armed, self.done = False, True
                self.workers.append(actors("WorkerActor"))
                (rank,) = actors("LearnerRank")
                rank.send_signal(self.number)
            if name == "latent_grpo" and completed == total:
                self.workers.append(actors("WorkerActor"))

        yield advance


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)])
def test_a_lost_rank_is_recovered_from_and_the_end_is_that_of_the_undisturbed_run(whole, tmp_path, number):
    reporter = Killing(3, number)
    limit = "deadlines.learner_s=20" if number == signal.SIGSTOP else "deadlines.learner_s=300"
    run = train(tiny(*COMMON, *QUIET, limit, f"runs_folder={tmp_path}"), "killed", reporter)
    said = reporter.console.export_text()
    assert "recovered within" in said
    assert "the run goes on after step 2; 1 step(s) are done again" in said
    lines = [(row["step"], row["lineage"]) for row in read_metrics(run.path)]
    assert lines == [(1, 0), (2, 0), (3, 1), (4, 1), (5, 1), (6, 1)]
    assert rows_of(run, range(1, 7)) == rows_of(whole, range(1, 7))
    expected, found = weights_of(whole), weights_of(run)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    (recovery,) = [json.loads(line) for line in (run.path / "recoveries.jsonl").read_text().splitlines()]
    assert (recovery["lineage"], recovery["reached"]) == (1, 3)
    assert recovery["cause"].startswith("learner rank")
    before, after = reporter.workers
    assert len(before) == 1
    assert after == before, "the worker keeps its process, and so its engine and its model"


class KillingInWrites(Killing):
    """Kills the rank while a checkpoint is being written, as soon as one is after so many steps."""

    def __init__(self, after, checkpoints):
        super().__init__(after, signal.SIGKILL)
        self.checkpoints, self.caught = checkpoints, False

    @contextlib.contextmanager
    def phase(self, name, total, unit="steps"):
        def advance(completed, note=""):
            if name == "latent_grpo" and completed >= self.after and not self.done:
                self.done = True
                threading.Thread(target=self.kill, daemon=True).start()

        yield advance

    def kill(self):
        while not any(path.name.startswith(".unfinished") for path in self.checkpoints().iterdir()):
            time.sleep(0.001)
        self.caught = True
        (rank,) = actors("LearnerRank")
        rank.send_signal(self.number)


@pytest.mark.slow  # tests/unit/test_background_checkpoints.py kills a process in the write
def test_a_rank_that_dies_while_its_state_is_written_beside_a_step_changes_nothing(whole, tmp_path):
    reporter = KillingInWrites(3, lambda: next(tmp_path.glob("*/checkpoints")))
    run = train(tiny(*COMMON, *QUIET, "checkpoint.every=1", f"runs_folder={tmp_path}"), "killed", reporter)
    assert reporter.caught
    assert "recovered within" in reporter.console.export_text()
    assert rows_of(run, range(1, 7)) == rows_of(whole, range(1, 7))
    expected, found = weights_of(whole), weights_of(run)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


class KillingWhileWeightsTravel(Killing):
    """Stops an actor's process before a publication, and kills it half a second later: in the middle of it."""

    def __init__(self, after, actor):
        super().__init__(after, signal.SIGKILL)
        self.actor, self.victim = actor, None

    @contextlib.contextmanager
    def phase(self, name, total, unit="steps"):
        def advance(completed, note=""):
            if name == "latent_grpo" and completed >= self.after and "publish" in note and not self.victim:
                (self.victim,) = actors(self.actor)
                self.victim.send_signal(signal.SIGSTOP)
                threading.Timer(0.5, self.victim.kill).start()

        yield advance


@pytest.mark.slow  # test_pool_faults.py and the first test here have the same without a run, and at another moment
@pytest.mark.parametrize("actor", ["LearnerRank", "WorkerActor"])
def test_a_rank_or_a_worker_that_dies_while_weights_travel_changes_nothing(whole, tmp_path, caplog, actor):
    reporter = KillingWhileWeightsTravel(3, actor)
    run = train(tiny(*COMMON, *QUIET, f"runs_folder={tmp_path}"), "killed", reporter)
    said = reporter.console.export_text()
    if actor == "LearnerRank":
        assert "learner rank 0 died while it had to publish" in said
        assert "recovered within" in said
    else:
        assert f"lost (process {reporter.victim.pid}" in caplog.text
        assert not (run.path / "recoveries.jsonl").exists()
    assert rows_of(run, range(1, 7)) == rows_of(whole, range(1, 7))
    expected, found = weights_of(whole), weights_of(run)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.slow  # tests/unit/test_recovery_limit.py counts recoveries without Ray
def test_beyond_the_limit_the_run_ends_and_says_how_it_goes_on(ray_session, tmp_path):
    reporter = Killing(3, signal.SIGKILL, again=True)
    with pytest.raises(RunError, match=r"max_recoveries allows 1; `latent-grpo train --resume \S+` continues"):
        train(tiny(*COMMON, *QUIET, "max_recoveries=1", f"runs_folder={tmp_path}"), "killed", reporter)


@pytest.mark.slow  # test_train.py has whole runs; this is the order in which their services start
def test_the_learner_starts_while_a_worker_is_still_starting(ray_session, tmp_path):
    before, beside = {p.pid for p in actors("WorkerActor") + actors("LearnerRank")}, threading.Event()

    def first(name):
        end = time.monotonic() + 120
        while time.monotonic() < end:
            for process in actors(name):
                if process.pid not in before:
                    return process
            time.sleep(0.02)
        return None

    def hold_worker():
        worker = first("WorkerActor")
        worker.send_signal(signal.SIGSTOP)  # it has a process, and makes its engine next
        if first("LearnerRank"):
            beside.set()
        worker.send_signal(signal.SIGCONT)

    threading.Thread(target=hold_worker, daemon=True).start()
    train(tiny(*QUIET, "steps=1", f"runs_folder={tmp_path}"), "beside")
    assert beside.is_set()


def test_two_runs_never_hold_halves_of_what_each_needs(ray_session):
    """Each needs three of the four CPUs: the second waits for all of them, says so, and begins when they are free."""
    console = Console(file=io.StringIO(), width=300, record=True)
    config = tiny("learner.ranks=2", "learner.resources.num_cpus=1", "rollout.resources.num_cpus=1")
    first = contextlib.ExitStack()
    first.enter_context(session(config, Reporter(console)))
    given_back = threading.Event()

    def end_first():
        given_back.set()
        first.close()

    threading.Timer(5.0, end_first).start()  # after the second has said that it waits
    with session(config, Reporter(console)) as places:
        assert given_back.is_set()
        assert (len(places.ranks), len(places.workers)) == (2, 1)
    said = console.export_text()
    assert "waiting for room in the cluster: 2 learner rank(s) and 1 rollout worker(s) need 3 CPU (1 free of 4)" in said
