"""The best checkpoint of a run, and its end on a metric: what decides them, and what a resumed run knows of them."""

import io
import json
from dataclasses import dataclass

import pytest
from rich.console import Console

from latent_grpo.common.config import ConfigError, load_config
from latent_grpo.common.config.resume import refused_changes
from latent_grpo.common.metrics import MetricsWriter
from latent_grpo.deploy.run.folder import RunFolder
from latent_grpo.deploy.run.milestones import Milestones
from latent_grpo.deploy.run.progress import Reporter
from latent_grpo.learner.best_checkpoint import Scores, best_checkpoint
from latent_grpo.learner.checkpoint import CheckpointError, list_checkpoints, write_checkpoint

SETTINGS = {
    "model": {"new": {}},
    "tasks": [{"name": "chains", "path": "builtin:chain_arithmetic", "max_prompt_tokens": 10,
               "max_response_tokens": 16}],
    "evaluation": {"every": 5, "tasks": [
        {"name": name, "path": "builtin:chain_arithmetic", "options": {"size": 4}, "max_prompt_tokens": 10,
         "max_response_tokens": 16} for name in ("a", "b")]},
}  # fmt: skip


@dataclass
class Task:
    task: str
    pass_at_1: float

    def figures(self):
        return {"pass_at_1": self.pass_at_1, "chain_length": 7.0}


class Run:
    """A run folder with checkpoints of a few bytes; `keep` writes one, as the loop's keeper does."""

    def __init__(self, path, **changes):
        self.folder = RunFolder(path)
        self.console = Console(file=io.StringIO(), width=200, record=True)
        self.config = load_config({**SETTINGS, **changes})
        self.written = []

    def milestones(self, step=0):
        self.now = Milestones(self.folder, self.config, step, Reporter(self.console))
        return self.now

    def keep(self, step):
        present = list_checkpoints(self.folder.checkpoints)
        if present and present[-1][0] == step:
            return
        self.written.append(step)

        def fill(folder):
            (folder / "weights").write_bytes(b"%d" % step * 20)

        write_checkpoint(self.folder.checkpoints, step, fill, {"step": step}, 1, self.now.protected)

    def evaluate(self, step, *scores):
        tasks = [Task(name, score) for name, score in zip("ab", scores)]
        with MetricsWriter(self.folder.path) as metrics:
            values = {f"{t.task}/{name}": value for t in tasks for name, value in t.figures().items()}
            metrics.write(step, values, kind="evaluation")
        self.now.evaluated(step, tasks, self.keep)

    def steps(self):
        return [step for step, _ in list_checkpoints(self.folder.checkpoints)]

    def said(self):
        return self.console.export_text(clear=True)


def test_the_best_checkpoint_outlives_the_newer_ones(tmp_path):
    run = Run(tmp_path)
    run.milestones()
    run.evaluate(5, 0.2, 0.4)
    run.evaluate(10, 0.6, 0.6)  # no checkpoint is due, and this one is written
    for step in (15, 20, 25):
        run.keep(step)
        run.evaluate(step, 0.1, 0.5)
    assert run.steps() == [10, 25]
    assert run.written == [5, 10, 15, 20, 25]
    found, metric, score = best_checkpoint(run.folder.checkpoints)
    assert (found.step, metric, score) == (10, "evaluation/pass_at_1", pytest.approx(0.6))


def test_of_equal_scores_the_earlier_checkpoint_stays(tmp_path):
    run = Run(tmp_path)
    run.milestones()
    run.evaluate(5, 0.5, 0.5)
    run.keep(10)
    run.evaluate(10, 0.4, 0.6)
    assert run.written == [5, 10]
    assert best_checkpoint(run.folder.checkpoints)[0].step == 5


def test_a_resumed_run_knows_the_best_checkpoint(tmp_path):
    run = Run(tmp_path)
    run.milestones()
    run.evaluate(5, 0.9, 0.9)
    again = Run(tmp_path)
    again.milestones(5)
    again.evaluate(10, 0.5, 0.5)
    again.keep(15)
    again.keep(20)
    assert again.written == [15, 20]
    assert again.steps() == [5, 20]


def test_a_damaged_best_checkpoint_is_skipped_with_its_reason(tmp_path):
    run = Run(tmp_path, checkpoint={"keep": 3})
    run.milestones()
    run.evaluate(5, 0.9, 0.9)
    run.keep(10)
    run.evaluate(10, 0.5, 0.5)
    (list_checkpoints(run.folder.checkpoints)[0][1] / "weights").unlink()
    found, _, _ = best_checkpoint(run.folder.checkpoints)
    assert found.step == 10
    assert [(s.path.name, s.reason) for s in found.skipped] == [("00000-step-000005", "weights is missing")]
    again = Run(tmp_path)
    again.milestones(10)
    assert "best checkpoint 00000-step-000005 skipped: weights is missing" in again.said()
    assert again.now.protected == ("00001-step-000010",)
    (list_checkpoints(run.folder.checkpoints)[1][1] / "weights").unlink()
    with pytest.raises(CheckpointError, match="all checkpoints with a score are damaged"):
        best_checkpoint(run.folder.checkpoints)


def test_another_metric_chooses_anew_and_says_so(tmp_path):
    run = Run(tmp_path)
    run.milestones()
    run.evaluate(5, 0.9, 0.1)
    again = Run(tmp_path, checkpoint={"keep_best": "evaluation/b/pass_at_1"})
    again.milestones(5)
    assert "chosen by evaluation/pass_at_1; from now on evaluation/b/pass_at_1 decides" in again.said()
    again.evaluate(10, 0.0, 0.2)
    assert best_checkpoint(run.folder.checkpoints)[0].step == 10


def test_null_keeps_none(tmp_path):
    run = Run(tmp_path, checkpoint={"keep_best": None})
    run.milestones()
    run.evaluate(5, 0.9, 0.9)
    assert run.written == []
    assert best_checkpoint(run.folder.checkpoints) is None


def test_a_score_that_is_not_a_number_is_none(tmp_path):
    run = Run(tmp_path)
    run.milestones()
    run.now.evaluated(5, [Task("a", float("nan"))], run.keep)
    assert run.written == []


def test_a_damaged_file_of_scores_says_what_to_do(tmp_path):
    (tmp_path / "scores.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"scores.json is damaged .* remove it"):
        Scores(tmp_path, "evaluation/pass_at_1")


# --- the end on a metric -------------------------------------------------------------------------------------------

RULE = {"metric": "evaluation/a/pass_at_1", "above": 0.8, "for": 2}


def test_a_run_ends_after_so_many_measurements_in_a_row(tmp_path):
    run = Run(tmp_path, stop_on=RULE)
    run.milestones()
    for step, value in ((5, 0.9), (10, 0.7), (15, 0.85)):
        run.evaluate(step, value, 0.0)
        assert run.now.stopped is None
    run.evaluate(20, 0.95, 0.0)
    assert run.now.stopped == (
        "stopped at step 20: evaluation/a/pass_at_1 above 0.8 for 2 in a row (measured 0.85, 0.95; stop_on)"
    )
    assert run.said().count("stopped at step 20") == 1


def test_a_resumed_run_goes_on_counting_and_says_where_it_has_ended(tmp_path):
    run = Run(tmp_path, stop_on=RULE)
    run.milestones()
    run.evaluate(5, 0.9, 0.0)
    again = Run(tmp_path, stop_on=RULE)
    again.milestones(5)
    again.evaluate(10, 0.9, 0.0)
    assert again.now.stopped.startswith("stopped at step 10")
    third = Run(tmp_path, stop_on=RULE)
    assert third.milestones(10).stopped.startswith("stopped at step 10")
    assert "to go on, resume it with stop_on=null" in third.said().replace("\n", " ")
    assert Run(tmp_path, stop_on={**RULE, "above": 0.95}).milestones(10).stopped is None
    assert Run(tmp_path).milestones(10).stopped is None
    assert Run(tmp_path, stop_on=RULE).milestones(5).stopped is None  # from the checkpoint before


def test_a_metric_of_steps_ends_a_run_too(tmp_path):
    run = Run(tmp_path, stop_on={"metric": "rollout/reward", "below": 0.1})
    run.milestones()
    run.now.took(1, {"rollout/reward": 0.3})
    run.now.took(2, {"rollout/reward": float("nan")})
    assert run.now.stopped is None
    run.now.took(3, {"rollout/reward": 0.05})
    assert "rollout/reward below 0.1" in run.now.stopped


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"stop_on": {"metric": "evaluation/a/pass_at_1"}}, "exactly one of above and below must be given, got neith"),
        ({"stop_on": {"metric": "rollout/reward", "above": 1, "below": 0}}, "must be given, got both"),
        ({"stop_on": {"metric": "rollout/rewrad", "above": 1}}, "no metric 'rollout/rewrad' .* nearest: rollout/rew"),
        ({"stop_on": {"metric": "evaluation/c/pass_at_1", "above": 1}}, "nearest: evaluation/b/pass_at_1|evaluation/a"),
        ({"stop_on": {**RULE, "for": 0}}, r"stop_on.for: .*greater than 0, got 0"),
        ({"stop_on": {**RULE, "fro": 2}}, "stop_on.fro: unknown key; did you mean for"),
        ({"stop_on": RULE, "evaluation": {**SETTINGS["evaluation"], "every": 0}}, "set evaluation.every and evaluatio"),
        ({"algorithm": "grpo", "stop_on": {"metric": "latent/entropy", "below": 1}}, "no metric 'latent/entropy'"),
        ({"checkpoint": {"keep_best": "evaluation/chain_length"}}, "no metric 'evaluation/chain_length'"),
        ({"checkpoint": {"keep_best": "evaluation/a/mean_reward"}, "evaluation": {}}, "keep_best needs eval"),
    ],
)  # fmt: skip
def test_what_cannot_be_measured_is_refused_at_the_start(changes, said):
    with pytest.raises(ConfigError, match=said):
        load_config({**SETTINGS, **changes})


def test_the_rule_is_written_as_it_is_given_and_may_change_at_a_resume():
    config = load_config({**SETTINGS, "stop_on": RULE})
    stored = json.loads(json.dumps(config.model_dump(mode="json")))
    assert stored["stop_on"] == {**RULE, "below": None}
    assert load_config(stored) == config
    assert refused_changes(config, load_config(SETTINGS)) == []
