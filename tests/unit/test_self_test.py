"""The self-test at the start of a run: a learner that computes something else than the engine is not trained."""

from __future__ import annotations

import io
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fake_run import fake_config, fake_group
from rich.console import Console

from latent_grpo.common.agreement import TOLERANCES, Gap, spacing
from latent_grpo.deploy.run.progress import Reporter
from latent_grpo.deploy.run.self_test import SelfTestFailed, self_test
from latent_grpo.learner.gaps import ReplayReport

GROUPS = [fake_group(np.random.default_rng(g), 1, g, 4, 3) for g in range(2)]


class Pool:
    """Gives back what was made before."""

    def submit(self, requests):
        self.asked = [request.group_uid for request in requests]

    def poll(self, seconds):
        return GROUPS


class Learner:
    def __init__(self, latent, hard, largest_logit):
        self.report = ReplayReport(latent=latent, hard=hard, largest_logit=largest_logit)

    def replay(self, batch):
        self.rows = batch.num_rows
        return self.report


def gap(largest, mean=0.0, p99=0.0):
    return Gap(mean=mean, p99=p99, max=largest, count=20)


def outcome(latent, hard, largest_logit=30.0, console=None, **config):
    """What the run's metrics got; what was said is on the console."""
    written = []
    uids = [group.column("group_uid")[0].as_py() for group in GROUPS]
    run = SimpleNamespace(
        config=fake_config(self_test_groups=2, **config),
        pool=Pool(),
        problems=SimpleNamespace(
            requests=lambda ordinals, purpose: [SimpleNamespace(group_uid=uids[i]) for i in ordinals]
        ),
        metrics=SimpleNamespace(write=lambda step, values, **where: written.append((where["kind"], values))),
        lineage=0,
        reporter=Reporter(console or Console(quiet=True)),
    )
    learner = Learner(latent, hard, largest_logit)
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
    with pytest.raises(SelfTestFailed, match=rf"20 {which} components differ .*allowed in float32: 0.0+1 "):
        outcome(latent, hard)


BFLOAT16 = {"new": {}, "dtype": "bfloat16"}


def test_in_bfloat16_a_few_components_may_differ_more():
    outcome(gap(3.0, p99=0.1), gap(3.0, p99=0.1), model=BFLOAT16)
    with pytest.raises(SelfTestFailed, match=rf"allowed in bfloat16: {TOLERANCES['bfloat16'].p99:g} \(p99\)"):
        outcome(gap(3.0, p99=0.3), gap(0.0), model=BFLOAT16)


def test_a_gap_that_looks_like_rounding_is_called_so_and_another_is_not():
    rounded = gap(0.26, mean=0.064, p99=0.24)  # what logits rounded to bfloat16 gave on a real model
    with pytest.raises(SelfTestFailed, match=r"looks like rounding .* 0\.25 apart at the size of these logits \(36\)"):
        outcome(rounded, gap(0.0), largest_logit=36.0, model=BFLOAT16)
    with pytest.raises(SelfTestFailed, match="both load the same model") as found:
        outcome(rounded, gap(0.0), largest_logit=1.5, model=BFLOAT16)
    assert "rounding" not in str(found.value)
    with pytest.raises(SelfTestFailed, match="both load the same model"):
        outcome(gap(7.0, mean=1.2, p99=5.0), gap(0.0), largest_logit=36.0, model=BFLOAT16)


def test_the_alarms_limit_is_the_self_tests_too():
    wide = gap(0.3, mean=0.06, p99=0.1)
    with pytest.raises(SelfTestFailed, match=r"0.06 \(mean"):
        outcome(wide, gap(0.0), model=BFLOAT16)
    outcome(wide, gap(0.0), model=BFLOAT16, health={"max_log_prob_gap": 0.07})
    outcome(gap(0.3, mean=0.01, p99=0.3), gap(0.0), model=BFLOAT16, health={"max_log_prob_gap": 0.07})
    with pytest.raises(SelfTestFailed, match=r"allowed in bfloat16: 0.00\d+ \("):
        outcome(gap(0.1, mean=0.01), gap(0.0), model=BFLOAT16, health={"max_log_prob_gap": 0.001})


@pytest.mark.parametrize(
    ("limit", "said"), [(0.05, True), (1e-4, False), (1e-5, False), ("auto", False), (None, False)]
)
def test_a_limit_that_loosens_the_self_test_is_said(limit, said):
    console = Console(file=io.StringIO(), width=300)
    outcome(gap(1e-6), gap(0.0), console=console, health={"max_log_prob_gap": limit})
    assert ("(0.05) allows 500 times the usual gaps in float32" in console.file.getvalue()) == said


@pytest.mark.parametrize(
    ("dtype", "size", "expected"),
    [("bfloat16", 36.0, 0.25), ("bfloat16", 24.0, 0.125), ("bfloat16", 32.0, 0.25), ("float32", 1.0, 2.0**-23)],
)
def test_the_spacing_is_that_of_the_dtypes_neighbouring_numbers(dtype, size, expected):
    here = torch.tensor(size, dtype=getattr(torch, dtype))
    above = torch.nextafter(here, here + 1)
    assert spacing(dtype, size) == expected == float(above - here)


def test_no_size_has_no_spacing():
    assert spacing("bfloat16", 0.0) == spacing("bfloat16", math.inf) == 0.0
