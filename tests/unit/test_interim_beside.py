"""`evaluation.blocking: false`: the steps go on, and figures are those of their step, none lost or made twice."""

from __future__ import annotations

import pytest
from test_controller import SimulatedLearner, SimulatedPool, config, mixed, request
from test_interim import Recorded

from latent_grpo.common.config import ConfigError, load_config
from latent_grpo.common.metrics import MetricsWriter
from latent_grpo.deploy.controller import Controller
from latent_grpo.deploy.evaluation.interim import InterimEvaluations, checkpoints_of, make_up, owed
from latent_grpo.deploy.run.folder import RunFolder
from latent_grpo.learner.checkpoint import latest_checkpoint, write_checkpoint


class LendingPool(SimulatedPool):
    """What is asked of the worker that is lent arrives one group a poll, behind `slow` polls."""

    def __init__(self, cluster, workers=2, slow=20):
        super().__init__(mixed)
        self.cluster, self.workers, self.slow = cluster, workers, slow
        self.lent, self.asked, self.kept = [], [], None  # groups that wait; those asked for; version of the loan

    def lend(self):
        if self.workers < 2:
            return False
        self.kept = self.version
        return True

    def submit_lent(self, requests):
        self.lent += [(r, self.kept) for r in requests]
        self.asked += self.lent

    def end_loan(self):
        self.kept = None

    def poll(self, timeout_s):
        self.slow -= bool(self.lent)
        arrived = []
        if self.lent and self.slow < 0:
            (asked, _), *self.lent = self.lent
            arrived = self.cluster.gather([asked], lambda count: None)
        return arrived + super().poll(timeout_s)


def run_of(path, *overrides, workers=2, slow=20):
    """A run whose evaluations are beside the steps, its controller, and what it found, by step."""
    run = Recorded("evaluation.blocking=false", *overrides)
    run.folder = RunFolder(path)
    run.pool = run.workers = LendingPool(run.cluster, workers, slow)
    controller = Controller(
        config(), run.pool, SimulatedLearner(), lambda ordinals: [request(o, config()) for o in ordinals]
    )
    controller.begin()
    found, kept = {}, []
    evaluations = InterimEvaluations(run, controller, lambda step, results: found.update({step: results}), kept.append)
    return run, controller, evaluations, found, kept


def test_steps_are_made_meanwhile_and_the_figures_are_those_of_a_run_that_waits(tmp_path):
    run, controller, evaluations, found, kept = run_of(tmp_path)
    before = [controller.run_step() for _ in range(2)]
    evaluations.begin(2)
    assert (kept, evaluations.state) == ([2], {"evaluating": 2})
    after = []
    while not found:
        after.append(controller.run_step())
        evaluations.look()
    assert len(after) >= 2
    assert {version for _, version in run.pool.asked} == {2}
    assert (run.pool.kept, evaluations.state, controller.beside) == (None, {}, None)
    waits = Recorded()
    waits.evaluated(2, "step-2")
    assert run.curve == waits.curve == {2: 0.5}
    # training knows nothing of it
    undisturbed = Controller(
        config(), SimulatedPool(mixed), SimulatedLearner(), lambda ordinals: [request(o, config()) for o in ordinals]
    )
    undisturbed.begin()
    same = [undisturbed.run_step() for _ in before + after]
    assert [r.batch for r in before + after] == [r.batch for r in same]


def test_the_next_one_and_the_end_of_the_run_wait_for_it(tmp_path):
    run, controller, evaluations, found, _ = run_of(tmp_path)
    controller.run_step()
    evaluations.begin(1)
    evaluations.finish()
    assert list(found) == [1]
    assert "waiting for the evaluation of step 1" in run.console.export_text()


def test_without_a_worker_to_spare_the_learner_waits_and_it_is_said_once(tmp_path):
    run, controller, evaluations, found, _ = run_of(tmp_path, workers=1)
    controller.gather = run.cluster.gather
    for step in (1, 2):
        controller.run_step()
        evaluations.begin(step)
        assert evaluations.state == {}
    assert list(found) == [1, 2]
    assert run.console.export_text().count("fewer than two rollout workers serve") == 1


class Restored:
    """A learner that says which checkpoints it holds."""

    def __init__(self):
        self.held = []

    def load(self, folder):
        self.held.append((folder / "weights").read_text())

    def publish(self, version):
        return self.held[-1]


def checkpoint(root, step, **state):
    def fill(folder):
        (folder / "learner").mkdir()
        (folder / "learner" / "weights").write_text(f"weights {step}")

    write_checkpoint(root, step, fill, {"step": step, **state}, 9)


@pytest.mark.parametrize("damaged", [False, True])
def test_an_evaluation_that_was_broken_off_is_made_up_from_the_checkpoint_of_its_step(tmp_path, damaged):
    run, _, _, found, _ = run_of(tmp_path)
    checkpoint(run.folder.checkpoints, 10)
    checkpoint(run.folder.checkpoints, 12, evaluating=10)
    MetricsWriter(tmp_path).close()
    latest = latest_checkpoint(run.folder.checkpoints)
    assert owed(run, latest.state) == 10
    if damaged:
        (folder,) = checkpoints_of(run.folder.checkpoints, 10)
        (folder / "learner" / "weights").write_text("weights 1O")
    published, learner = [], Restored()
    run.pool.publish, run.pool.poll = published.append, lambda timeout_s: arrived(run)
    run.pool.submit = lambda requests: run.pool.lent.extend(requests)
    make_up(run, learner, 10, latest, lambda step, results: found.update({step: results}))
    if damaged:
        assert (learner.held, published, found) == ([], [], {})
        assert "cannot be made up; its checkpoint: learner/weights is damaged" in run.console.export_text()
    else:
        assert (learner.held, published, list(found)) == (["weights 10", "weights 12"], ["weights 10"], [10])
        assert run.curve == {10: 0.5}


def arrived(run):
    requests, run.pool.lent = run.pool.lent, []
    return run.cluster.gather(requests, lambda count: None)


def test_only_what_was_not_measured_is_owed(tmp_path):
    run, _, _, _, _ = run_of(tmp_path)  # evaluation.every is 10
    with MetricsWriter(tmp_path) as metrics:
        assert [owed(run, {"step": step}) for step in (0, 9, 10, run.config.steps)] == [None, None, 10, None]
        metrics.write(10, {}, kind="evaluation")
        assert owed(run, {"step": 10}) is None
        assert owed(run, {"step": 13, "evaluating": 10}) is None


def test_the_key_needs_evaluations_between_start_and_end():
    with pytest.raises(ConfigError, match=r"evaluation\.blocking has no effect with evaluation\.every 0"):
        load_config("quickstart", ["evaluation.blocking=false", "evaluation.every=0"])
