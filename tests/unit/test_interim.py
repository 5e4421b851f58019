"""Evaluations between a run's start and end measure less, and the run's curve is of the same problems throughout."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest
from rich.console import Console
from test_evaluate import Cluster, evaluation_of

from latent_grpo.common.config import ConfigError, load_config
from latent_grpo.deploy.evaluation.evaluate import evaluate
from latent_grpo.deploy.run.progress import Reporter

INTERIM = ("evaluation.every=10", "evaluation.runs=3", "evaluation.samples=4", "evaluation.sampled_problems=1")


class Recorded:
    """Stands for a run: keeps what an evaluation writes."""

    def __init__(self, *overrides):
        self.config, self.problems = evaluation_of(*INTERIM, *overrides)
        self.cluster = Cluster(lambda noisy, problem, index: problem < 2)
        self.console = Console(record=True, width=200, file=io.StringIO())
        self.reporter, self.lineage, self.summary = Reporter(self.console), 0, {}
        self.curve, self.dumped = {}, []
        self.metrics = SimpleNamespace(write=self._write)
        self.store = SimpleNamespace(write=lambda step, rows, purpose, lineage: self.dumped.append((step, len(rows))))

    def _write(self, step, values, kind, lineage):
        assert kind == "evaluation"
        self.curve[step] = values["chain-arithmetic-held-out/pass_at_1"]

    def record(self, **values):
        self.summary |= values

    def evaluated(self, step, tag):
        """Returns the figures that a run goes by, and how many samples were asked for."""
        self.cluster.requests.clear()
        (result,) = evaluate(self, self.cluster.gather, step, tag)
        asked = sum(len(r.sample_indices) for r in self.cluster.requests)
        return result.pass_at_1, asked


def test_the_curve_is_of_the_first_problems_and_the_ends_are_of_all():
    run = Recorded("evaluation.interim_problems=2", "evaluation.interim_runs=1", "dump.evaluation=true")
    assert run.evaluated(0, "before") == (1.0, 4 * 3 + 4), "all problems and pass@k, the first ones among them"
    assert run.evaluated(10, "step-10") == (1.0, 2)
    assert run.evaluated(20, "after") == (1.0, 4 * 3 + 4)
    assert run.curve == {0: 1.0, 10: 1.0, 20: 1.0}
    assert run.summary["before"]["chain-arithmetic-held-out/pass_at_1"] == 0.5
    assert run.summary["after"]["chain-arithmetic-held-out/sampled_pass_at_1"] == 1.0
    assert [step for step, _ in run.dumped] == [0, 0, 10, 20, 20]
    said = run.console.export_text()
    assert said.count(" (first 2 problems): pass@1 1.000") == 1
    assert said.count("pass@1 0.500") == 2


def test_without_the_keys_every_evaluation_is_of_all_problems():
    run = Recorded()
    assert [run.evaluated(0, "before"), run.evaluated(10, "step-10")] == [(0.5, 4 * 3 + 4), (0.5, 4 * 3)]
    assert run.curve == {0: 0.5, 10: 0.5}


def test_more_first_problems_than_there_are_is_all_of_them():
    assert Recorded("evaluation.interim_problems=99").evaluated(10, "step-10") == (0.5, 4 * 3)


def test_the_keys_need_evaluations_between_start_and_end():
    with pytest.raises(ConfigError, match=r"interim_problems and interim_runs has no effect with evaluation\.every 0"):
        load_config("quickstart", ["evaluation.interim_problems=2", "evaluation.every=0"])
