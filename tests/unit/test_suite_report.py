"""What a suite's report says, in both of its layouts."""

import dataclasses

import pytest

from latent_grpo.deploy.reproduce.figures import facts, figures
from latent_grpo.deploy.reproduce.manifest import Session, SuiteManifest
from latent_grpo.deploy.reproduce.page import page
from latent_grpo.deploy.reproduce.report import markdown
from latent_grpo.deploy.reproduce.results import UnitResult
from latent_grpo.deploy.reproduce.suite import Suite

SUITE = Suite.model_validate({
    "title": "s", "profile": "p", "seeds": [0, 1],
    "starts": {"latent": {"title": "the start"}},
    "arms": {"mixture": {"title": "the mixture", "start": "latent"}},
})  # fmt: skip
SESSION = Session(time="t", commit="c1", versions={"torch": "2"}, grader="g1")
MANIFEST = SuiteManifest(suite="s", profile="p", runner="r", seeds=[0, 1], machine="m", sessions=[SESSION])


def task(pass_at_1, length):
    return {
        "pass_at_1": pass_at_1, "standard_error": 0.0, "chain_length": length, "latent_length": length,
        "invalid_rate": 0.25, "sampled_pass_at_8": pass_at_1 + 0.1, "sampled_error_at_8": 0.0,
    }  # fmt: skip


def of_tasks(unit, seed, **tasks):
    return UnitResult(unit=unit, seed=seed, is_start=unit == "latent", metrics=task(0.5, 9.0), tasks=tasks)


def report_of(*found):
    return figures(SUITE, {(result.unit, result.seed): result for result in found}, MANIFEST)


def test_each_task_has_its_mean_over_seeds():
    report = report_of(
        of_tasks("mixture", 0, easy=task(0.8, 10.0), hard=task(0.2, 30.0)),
        of_tasks("mixture", 1, easy=task(0.9, 12.0), hard=task(0.2, 34.0)),
    )
    (row,) = report.arms
    assert row.tasks["easy"]["pass_at_1"].mean == pytest.approx(0.85)
    assert row.tasks["hard"]["chain_length"].mean == pytest.approx(32.0)
    assert "| easy | 0.850 [" in markdown(report)
    assert "| hard | 0.200 [0.200, 0.200] | 32.0 | 32.0 | 25.0% | 0.300 [0.300, 0.300] |" in markdown(report)
    assert "| task | pass@1 | chain length | latent steps | invalid rate | pass@8, noise on |" in markdown(report)
    html = page(report)
    assert "<h3>the mixture</h3><table><tr><th>task</th>" in html
    assert "<td>hard</td><td>0.200 [0.200, 0.200]</td><td>32.0</td>" in html


def test_a_suite_of_one_task_shows_its_figures_once():
    report = report_of(of_tasks("latent", 0, only=task(0.5, 9.0)))
    assert report.arms[0].tasks == {}
    assert "| only |" not in markdown(report)
    assert "<h2>Each task</h2>" not in page(report)


def test_the_report_names_every_commit_grader_and_data_that_sessions_had():
    def session(commit, grader, data):
        return dataclasses.replace(SESSION, commit=commit, grader=grader, data={"held": data})

    manifest = dataclasses.replace(
        MANIFEST,
        units={"a-seed0": "c1", "b-seed0": "c1", "c-seed0": "c2"},
        sessions=[session("c1", "g1", "d1"), session("c2", "g1", "d2"), session("c2", "g2", "d2")],
    )
    said = dict(facts(dataclasses.replace(report_of(), manifest=manifest)))
    assert said["commit"] == "c1 (1 session), c2 (2 sessions)"
    assert said["commit of the units"] == "c1 (2 units), c2 (1 unit)"
    assert said["grader"] == "g1 (2 sessions), g2 (1 session)"
    assert said["data: held"] == "d1 (1 session), d2 (2 sessions)"
    assert said["versions"] == "torch 2 (3 sessions)"
