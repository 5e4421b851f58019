"""Alarms: each is raised by what it is for, said in a plain sentence with cause and remedy, recorded, and ended."""

import dataclasses
import json
import re

import numpy as np
import pytest
from fake_run import fake_config, fake_trajectory

from latent_grpo.common.agreement import TOLERANCES
from latent_grpo.common.config import HealthConfig, PromptConfig, load_config
from latent_grpo.common.metrics import MetricsWriter
from latent_grpo.common.schema import encode
from latent_grpo.deploy.run.health import FILE, RULES, AlarmRecord, HealthMonitor, read_alarms
from latent_grpo.learner.cost import StepCost
from latent_grpo.learner.learner import summarize
from latent_grpo.learner.rank import RankReport, UpdateReport
from latent_grpo.rollout_workers.metrics import rollout_metrics

HEALTHY = {
    "rollout/reward": 0.5,
    "rollout/truncated_share": 0.02,
    "rollout/ungraded_share": 0.0,
    "rollout/verifier_timeout_share": 0.0,
    "rollout/reason_no_answer": 0.05,
    "latent/thinking_end_rate": 0.99,
    "rollout/latent_share": 0.6,
    "latent/entropy": 0.5,
    "latent/effective_width": 1.8,
    "batch/zero_variance_share": 0.4,
    "batch/staleness_mean": 0.0,
    "learner/drift_mean": 1e-4,
    "learner/latent_gap_mean": 1e-5,
    "learner/hard_gap_mean": 1e-5,
    "learner/ratio_p01": 0.95,
    "learner/ratio_p99": 1.05,
    "learner/clip_fraction_low": 0.01,
    "learner/clip_fraction_high": 0.01,
    "learner/clip_fraction_dual": 0.0,
    "learner/skipped_updates": 0.0,
    "time/step_s": 10.0,
    "time/rollout_wait_s": 6.0,
    "time/learner_s": 3.0,
    "time/publish_s": 0.5,
    "time/dump_wait_s": 0.0,
}
PROVOKED = {
    "min_thinking_end_rate": ({"latent/thinking_end_rate": 0.02}, "98% of rollouts never left latent mode"),
    "min_latent_share_retained": (
        {"rollout/latent_share": 0.3},
        "share of latent steps has fallen to 50% of what it was",
    ),
    "max_truncated_share": ({"rollout/truncated_share": 0.8}, "80% of rollouts were cut off"),
    "max_log_prob_gap": ({"learner/hard_gap_mean": 0.3}, "differ from the rollout's by 0.3 on average (limit 0.0001)"),
    "max_stale_log_prob_gap": ({"learner/drift_mean": 0.9}, "differ by 0.9 in log-prob"),
    "max_ratio_p99": ({"learner/ratio_p99": 7.0}, "above 7"),
    "min_ratio_p01": ({"learner/ratio_p01": 0.1}, "below 0.1"),
    "max_clipped_share": ({"learner/clip_fraction_low": 0.5}, "51% of response steps were clipped"),
    "max_zero_variance_share": ({"batch/zero_variance_share": 0.95}, "in 95% of groups all rewards were equal"),
    "max_no_answer_share": ({"rollout/reason_no_answer": 0.97}, "in 97% of rollouts the verifier found no answer"),
    "max_verifier_timeout_share": ({"rollout/verifier_timeout_share": 0.2}, "20% of answers were not graded in time"),
    "max_ungraded_share": ({"rollout/ungraded_share": 0.05}, "5% of rollouts could not be graded"),
    "max_staleness_mean": ({"batch/staleness_mean": 12.0}, "12 policy versions old"),
    "max_rollout_wait_share": ({"time/rollout_wait_s": 9.8}, "waits for rollouts in 98% of the time"),
    "max_learner_share": ({"time/learner_s": 9.5}, "the learner takes 95% of a step"),
    "max_publish_share": ({"time/publish_s": 4.0}, "publishing weights takes 40% of a step"),
    "max_dump_wait_share": ({"time/dump_wait_s": 1.0}, "waits for the disk in 10% of the time"),
    "min_effective_width": ({"latent/effective_width": 1.001}, "only 1 tokens in effect"),
    "max_relative_width": ({"latent/effective_width": 2.999}, "100% of the way to being uniform"),
    "max_skipped_updates": ({"learner/skipped_updates": 1.0}, "1 updates per step were not finite"),
    "min_reward_retained": ({"rollout/reward": 0.1}, "fallen to 20% of its best level"),
}


def monitor(path, lineage=0, staleness=0, model=None, **limits):
    base = fake_config().model_dump(mode="json")
    base |= {} if model is None else {"model": model}
    base |= {"health": {"max_relative_width": 0.99, "window": 1, **limits}, "max_staleness": staleness}
    return HealthMonitor(path, load_config(base), lineage)


def test_a_healthy_run_raises_nothing(tmp_path):
    for staleness in (0, 2):
        watched = monitor(tmp_path, staleness=staleness)
        assert [alarm for step in range(1, 9) for alarm in watched.judge(step, HEALTHY)] == []


def test_every_limit_has_its_rule_and_every_rule_its_provocation():
    limits = {name for name in HealthConfig.model_fields if name.startswith(("min_", "max_"))}
    assert limits == {rule.name for rule in RULES} == PROVOKED.keys()


@pytest.mark.parametrize("name", PROVOKED)
def test_each_alarm_is_raised_by_its_cause_alone_and_ends_with_it(tmp_path, name):
    changes, words = PROVOKED[name]
    watched = monitor(tmp_path, staleness=1 if name == "max_stale_log_prob_gap" else 0)
    assert watched.judge(1, HEALTHY) == []
    (raised,) = watched.judge(2, HEALTHY | changes)
    assert (raised.name, raised.state) == (name, "raised")
    assert words in raised.message
    assert raised.cause in raised.sentence
    assert raised.remedy in raised.sentence
    assert watched.judge(3, HEALTHY | changes) == [], "said once"
    (over,) = watched.judge(4, HEALTHY)
    assert (over.name, over.state) == (name, "over")
    assert watched.active == ()


@pytest.mark.parametrize("name", PROVOKED)
def test_each_limit_can_be_moved_and_turned_off(tmp_path, name):
    changes, _ = PROVOKED[name]
    staleness = 1 if name == "max_stale_log_prob_gap" else 0
    wide = 0.0 if name.startswith("min_") else 100.0
    for limit in (None, wide):
        watched = monitor(tmp_path, staleness=staleness, **{name: limit})
        assert [a for s in (1, 2) for a in watched.judge(s, HEALTHY | (changes if s == 2 else {}))] == []


def test_the_latent_share_is_compared_with_the_runs_own_start(tmp_path):
    shares = [0.6, 0.6, 0.6, 0.5, 0.45, 0.4]
    watched = monitor(tmp_path, window=2)
    said = [[a.name for a in watched.judge(s, HEALTHY | {"rollout/latent_share": v})] for s, v in enumerate(shares, 1)]
    assert said[:-1] == [[]] * 5
    assert said[-1] == []  # (0.45 + 0.4) / 2 of 0.6 is 0.708
    assert [a.name for a in watched.judge(7, HEALTHY | {"rollout/latent_share": 0.4})] == ["min_latent_share_retained"]
    with MetricsWriter(tmp_path) as metrics:
        for step in (1, 2):
            metrics.write(step, {"rollout/latent_share": 0.6})
    resumed = monitor(tmp_path, lineage=1, window=2)
    assert [a.name for a in resumed.judge(3, HEALTHY | {"rollout/latent_share": 0.3})] == ["min_latent_share_retained"]


def test_a_single_bad_step_among_good_ones_is_averaged_away(tmp_path):
    watched = monitor(tmp_path, window=5)
    bad = HEALTHY | {"rollout/truncated_share": 0.9}
    said = [watched.judge(step, bad if step == 5 else HEALTHY) for step in range(1, 8)]
    assert not any(said)
    assert [a.state for step in range(8, 13) for a in watched.judge(step, bad)] == ["raised"]


def test_an_alarm_that_lasts_is_repeated_now_and_then(tmp_path):
    watched = monitor(tmp_path, repeat=3)
    bad = HEALTHY | {"rollout/truncated_share": 0.9}
    assert [(a.step, a.state) for s in range(1, 9) for a in watched.judge(s, bad)] == [
        (1, "raised"), (4, "lasting"), (7, "lasting"),
    ]  # fmt: skip


def test_a_step_without_a_metric_says_nothing_about_it(tmp_path):
    watched = monitor(tmp_path)
    assert watched.judge(1, {"rollout/reward": 0.0}) == []
    assert watched.judge(2, HEALTHY | {"learner/ratio_p99": float("nan")}) == []


def test_the_record_is_read_back_without_abandoned_steps_and_without_a_torn_line(tmp_path):
    bad = HEALTHY | {"rollout/truncated_share": 0.9}
    with MetricsWriter(tmp_path) as metrics:
        first = monitor(tmp_path)
        for step in (1, 2, 3):
            first.judge(step, bad if step == 3 else HEALTHY)
            metrics.write(step, {"rollout/reward": 0.5})
        assert [a.name for a in read_alarms(tmp_path).alarms] == ["max_truncated_share"]
        with (tmp_path / FILE).open("a") as file:
            file.write('{"step": 4')
        assert len(read_alarms(tmp_path).alarms) == 1
        second = monitor(tmp_path, lineage=1)  # from the checkpoint of step 1; nothing is wrong this time
        for step in (2, 3):
            second.judge(step, HEALTHY)
            metrics.write(step, {"rollout/reward": 0.5}, lineage=1)
        assert read_alarms(tmp_path) == AlarmRecord((), ())
        (alarm,) = second.judge(4, bad)
        metrics.write(4, {"rollout/reward": 0.5}, lineage=1)
    assert read_alarms(tmp_path) == AlarmRecord((alarm,), ())


def test_a_damaged_or_foreign_line_of_the_record_costs_only_itself_and_is_named(tmp_path):
    with MetricsWriter(tmp_path) as metrics:
        metrics.write(1, {"rollout/reward": 0.5})
    assert read_alarms(tmp_path) == AlarmRecord((), ())
    (alarm,) = monitor(tmp_path).judge(1, HEALTHY | {"rollout/truncated_share": 0.9})
    row = dataclasses.asdict(alarm)
    bad = {
        "it has no cause, limit, lineage": {"step": 1},
        "unknown 'severity'": row | {"severity": 3},
        "value is nan": row | {"value": float("nan")},
        "step is [1]": row | {"step": [1]},
        "state is 'smoking'": row | {"state": "smoking"},
        "expected an object, got list": [1],
        "not JSON": "{",
        "not JSON: 'utf-8'": b"\xff\xfe",
    }
    lines = [
        b if isinstance(b, bytes) else b.encode() if isinstance(b, str) else json.dumps(b).encode()
        for b in bad.values()
    ]
    good = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(b"\n".join(lines) + b"\n" + good)
    record = read_alarms(tmp_path)
    assert record.alarms == (alarm,)
    for number, (sentence, said) in enumerate(zip(bad, record.left_out, strict=True), start=1):
        assert f"{FILE}, line {number}: " in said
        assert sentence in said


def rollouts(*changes, k=3):
    """The metrics of four trajectories, of which the last ones are changed."""
    rng = np.random.default_rng(0)
    rows = [fake_trajectory(rng, step=1, group=0, index=i, k=k, reward=float(i % 2)) for i in range(4)]
    first = len(rows) - len(changes)
    rows[first:] = [dataclasses.replace(row, **change) for row, change in zip(rows[first:], changes, strict=True)]
    return rollout_metrics(encode(rows, k))


NEVER_LEFT = {
    "hard_ids": np.zeros(0, np.int32), "hard_log_probs": np.zeros(0, np.float32), "finish_reason": "length",
}  # fmt: skip
SINGLE = {
    "latent_ids": np.zeros((2, 3), np.int32), "latent_log_probs": np.zeros((2, 3), np.float32),
    "latent_scores": np.array([[60.0, 0, 0]] * 2, np.float32),
}  # fmt: skip
UNIFORM = {**SINGLE, "latent_scores": np.zeros((2, 3), np.float32)}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ([{}], set()),
        ([NEVER_LEFT] * 4, {"min_thinking_end_rate", "max_truncated_share"}),
        ([{"finish_reason": "length"}] * 3, {"max_truncated_share"}),
        ([{"grade_reason": "timeout", "reward": 0.0}], {"max_verifier_timeout_share"}),
        ([{"grade_reason": "ungraded", "reward": None}], {"max_ungraded_share"}),
        ([{"grade_reason": "no_answer", "reward": 0.0}] * 4, {"max_no_answer_share"}),
        ([SINGLE] * 4, {"min_effective_width"}),
        ([UNIFORM] * 4, {"max_relative_width"}),
    ],
)
def test_trajectories_raise_what_is_wrong_with_them(tmp_path, changes, expected):
    assert {alarm.name for alarm in monitor(tmp_path).judge(1, rollouts(*changes))} == expected


def learned(*, ratio=1.0, gap=0.0, applied=True, clipped=0, uncentered=(), peak=None, importance=()):
    """The metrics of a learner's step of a hundred response steps."""
    cost = StepCost("cpu", {"replay": 0.5, "forward": 0.25, "backward": 1.0, "optimizer": 0.125}, 800, 600, 5e11)
    hundred = np.full(100, 1.0, np.float32)
    update = UpdateReport(
        loss=0.0, kl=0.0, grad_norm=1.0 if applied else float("nan"), applied=applied, bad_in_a_row=0,
        clipped_low=clipped, clipped_high=0, clipped_dual=0, ratios=hundred * ratio, flip_shares=hundred, bad_rows=(),
    )  # fmt: skip
    report = RankReport(
        advantages=hundred, mean_old_log_probs=hundred, first_token=hundred > 0, updates=(update,),
        drift=np.repeat(np.float32([0.5, 2.0, 0.25]), [50, 10, 40]),
        latent_gap=hundred * 0, hard_gap=hundred * gap, latent_mass=hundred,
        uncentered=np.array(uncentered, np.float32), hard_log_probs=hundred, learning_rate=1e-3, seconds=2.0,
        kinds=np.repeat(np.arange(3, dtype=np.int8), [50, 10, 40]), importance=np.array(importance, np.float32),
        tokens=3000, cost=cost, peak=peak, records=None,
    )  # fmt: skip
    return summarize([report]).metrics


def test_a_step_says_how_fast_it_was_and_how_much_was_padding():
    found = learned(peak=1e12)
    assert found["learner/tokens_per_s"] == 1500
    assert found["learner/real_token_share"] == 0.75
    assert found["learner/backward_s"] == 1.0
    assert found["learner/mfu"] == 0.25
    assert "learner/mfu" not in learned()


def test_the_gap_is_told_by_latent_leaving_and_visible_steps():
    found = learned()
    names = ("latent", "leaving", "visible")
    assert [found[f"learner/drift_{name}_mean"] for name in names] == [0.5, 2.0, 0.25]
    assert "learner/importance_mean" not in found
    weighed = learned(importance=[0.0, 1.0, 2.0, 1.0])
    assert (weighed["learner/importance_mean"], weighed["learner/importance_masked_share"]) == (1.0, 0.25)


def test_steps_that_could_not_be_centered_are_counted_and_only_where_centering_is_on():
    assert learned(uncentered=(0, 1, 0, 0))["learner/uncentered_share"] == 0.25
    assert "learner/uncentered_share" not in learned()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, set()),
        ({"ratio": 5.0}, {"max_ratio_p99"}),
        ({"ratio": 0.1}, {"min_ratio_p01"}),
        ({"clipped": 60}, {"max_clipped_share"}),
        ({"gap": 0.2}, {"max_log_prob_gap"}),
        ({"applied": False}, {"max_skipped_updates"}),
    ],
)
def test_a_learners_step_raises_what_is_wrong_with_it(tmp_path, change, expected):
    assert {alarm.name for alarm in monitor(tmp_path).judge(1, learned(**change))} == expected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_alarm_of_log_probs_begins_where_the_self_test_refuses(tmp_path, dtype):
    limit = TOLERANCES[dtype].mean
    for gap, expected in ((0.9 * limit, set()), (1.1 * limit, {"max_log_prob_gap"})):
        watched = monitor(tmp_path, model={"new": {}, "dtype": dtype})
        assert {alarm.name for alarm in watched.judge(1, learned(gap=gap))} == expected


def test_settings_that_a_remedy_names_exist():
    base = fake_config().model_dump(mode="json")
    base["model"]["prompt"] = dict.fromkeys(PromptConfig.model_fields)  # written only where they are set
    for rule in RULES:
        for key in re.findall(r"\b((?:rollout|learner|optimizer|model|dump|noise|clip)\.[a-z_.]+[a-z])", rule.remedy):
            node = base
            for part in key.split("."):
                assert part in node, f"{rule.name} names {key}, which is no setting"
                node = node[part] if isinstance(node[part], dict) else {}


def test_an_alarm_around_its_limit_is_raised_once_and_is_over_after_a_whole_window(tmp_path):
    watched = HealthMonitor(tmp_path, load_config("quickstart", ["health.window=4"]), 0)
    name, (cause, _) = "max_truncated_share", PROVOKED["max_truncated_share"]
    states = []
    for step in range(1, 61):
        now = HEALTHY | cause if step <= 30 and step % 3 else HEALTHY  # the mean of four is now above, now below
        states += [(step, alarm.state) for alarm in watched.judge(step, now) if alarm.name == name]
    raised = [step for step, state in states if state == "raised"]
    over = [step for step, state in states if state == "over"]
    assert len(raised) == len(over) == 1
    assert over[0] > 30
