"""The self-test at the start of a run: a learner that computes something else than the engine is not trained."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
from fake_run import fake_config, fake_group
from rich.console import Console

from latent_grpo.deploy.run.progress import Reporter
from latent_grpo.deploy.train import SelfTestFailed, self_test
from latent_grpo.learner.learner import Gap, ReplayReport

GROUPS = [fake_group(np.random.default_rng(g), 1, g, 4, 3) for g in range(2)]


class Pool:
    """Gives back what was made before."""

    def submit(self, requests):
        self.asked = [request.group_uid for request in requests]

    def poll(self, seconds):
        return GROUPS


class Learner:
    def __init__(self, latent, hard):
        self.report = ReplayReport(latent=latent, hard=hard)

    def replay(self, batch):
        self.rows = batch.num_rows
        return self.report


def gap(largest, mean=0.0, p99=0.0):
    return Gap(mean=mean, p99=p99, max=largest, count=20)


def outcome(latent, hard, **config):
    """What the run's metrics got."""
    written = []
    uids = [group.column("group_uid")[0].as_py() for group in GROUPS]
    run = SimpleNamespace(
        config=fake_config(self_test_groups=2, **config),
        pool=Pool(),
        problems=SimpleNamespace(request=lambda i, purpose: SimpleNamespace(group_uid=uids[i], purpose=purpose)),
        metrics=SimpleNamespace(write=lambda step, values, **where: written.append((where["kind"], values))),
        lineage=0,
        reporter=Reporter(Console(quiet=True)),
    )
    learner = Learner(latent, hard)
    try:
        self_test(run, learner)
    finally:
        assert learner.rows == 8, "all that was generated is replayed"
    ((kind, values),) = written
    assert kind == "self_test"
    return values


def test_a_learner_that_agrees_is_trained_and_the_gaps_are_recorded():
    values = outcome(gap(9e-4), gap(2e-6))
    assert (values["latent_max"], values["hard_max"], values["latent_count"]) == (9e-4, 2e-6, 20)


@pytest.mark.parametrize(
    ("latent", "hard", "which"),
    [
        (gap(2e-3), gap(0.0), "latent"),
        (gap(0.0), gap(2e-3), "hard"),
        (gap(5e-4, mean=2e-3), gap(0.0), "latent"),
        (gap(0.0), gap(math.nan), "hard"),
    ],
)
def test_a_learner_that_computes_something_else_is_not_trained(latent, hard, which):
    with pytest.raises(SelfTestFailed, match=rf"20 {which} components differ .*allowed in float32: 0.001"):
        outcome(latent, hard)


def test_in_bfloat16_a_few_components_may_differ_more():
    model = {"new": {}, "dtype": "bfloat16"}
    outcome(gap(3.0, p99=0.1), gap(3.0, p99=0.1), model=model)
    with pytest.raises(SelfTestFailed, match=r"allowed in bfloat16: 0.2"):
        outcome(gap(3.0, p99=0.3), gap(0.0), model=model)
