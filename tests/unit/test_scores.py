"""The figures of an evaluation against independent computations (METHOD §8)."""

from __future__ import annotations

import dataclasses
import itertools
import statistics

import numpy as np
import pytest

from latent_grpo.common.figure_names import by_label
from latent_grpo.common.schema import encode
from latent_grpo.common.types import SamplingSettings, Trajectory
from latent_grpo.deploy.evaluation.scores import Tally, average, interval, macro_average, pass_at_k, results

K = 2


def trajectory(
    task: str, problem: int, sample: int, reward: float | None, latent: int, hard: int, valid: bool, reason: str = ""
):
    usual = "ungraded" if reward is None else "correct" if reward == 1 else "wrong"
    return Trajectory(
        purpose="evaluation",
        task=task,
        problem_uid=f"{task}/{problem}",
        group_uid=f"evaluation/t/{task}/{problem}",
        sample_index=sample,
        epoch=0,
        run_seed=0,
        policy_version_min=0,
        policy_version_max=0,
        engine="none",
        sampling=SamplingSettings(mode="latent", max_tokens=9, k=K),
        prompt_ids=np.array([1], np.int32),
        latent_ids=np.zeros((latent, K), np.int32),
        latent_scores=np.zeros((latent, K), np.float32),
        latent_log_probs=np.zeros((latent, K), np.float32),
        hard_ids=np.zeros(hard, np.int32),
        hard_log_probs=np.zeros(hard, np.float32),
        finish_reason="stop" if valid else "length",
        reward=reward,
        grade_reason=reason or usual,
    )


def groups_of(table: dict[str, list[list[float | None]]], latent: int = 3, hard: int = 2):
    """One record batch a problem; `table`: task -> problems -> rewards."""
    for task, problems in table.items():
        for number, rewards in enumerate(problems):
            yield encode([trajectory(task, number, i, r, latent, hard, valid=True) for i, r in enumerate(rewards)], k=K)


def sampled(groups, ks):
    """Task -> pass@k of its groups, for each k."""
    tallies = {}
    for group in groups:
        tallies.setdefault(group.column("task")[0].as_py(), Tally()).add(group)
    return {task: tally.pass_at_k(ks) for task, tally in tallies.items()}


# --- pass@k


@pytest.mark.parametrize("samples", [1, 2, 5, 7])
def test_pass_at_k_is_the_share_of_all_choices_of_k_samples_that_hold_a_correct_one(samples):
    for correct, k in itertools.product(range(samples + 1), range(1, samples + 1)):
        outcomes = [i < correct for i in range(samples)]
        choices = list(itertools.combinations(outcomes, k))
        assert pass_at_k(samples, correct, k) == pytest.approx(sum(map(any, choices)) / len(choices))


def test_pass_at_k_is_unbiased():
    """Over all outcomes of n tries of chance p it averages to 1 - (1 - p)^k; the plug-in estimate does not."""
    n, k, p = 6, 3, 0.3
    mean = plugged = 0.0
    for outcome in itertools.product((0, 1), repeat=n):
        chance = np.prod([p if right else 1 - p for right in outcome])
        mean += chance * pass_at_k(n, sum(outcome), k)
        plugged += chance * (1 - (1 - sum(outcome) / n) ** k)
    assert mean == pytest.approx(1 - (1 - p) ** k)
    assert abs(plugged - mean) > 0.01


@pytest.mark.parametrize(("samples", "correct", "k"), [(4, 5, 1), (4, 2, 5), (4, 2, 0), (4, -1, 2)])
def test_pass_at_k_refuses_what_has_no_meaning(samples, correct, k):
    with pytest.raises(ValueError, match="need 0 <= correct <= samples"):
        pass_at_k(samples, correct, k)


def test_pass_at_k_of_a_task_is_the_mean_over_problems_and_leaves_ungraded_samples_out():
    table = {"a": [[1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, None]]}
    (one, two, four) = sampled(groups_of(table), [1, 2, 4])["a"]
    assert (one.k, one.value) == (1, pytest.approx((0.25 + 0 + 1) / 3))
    assert two.value == pytest.approx((0.5 + 0 + 1) / 3)
    assert (four.value, four.problems) == (pytest.approx((1 + 0) / 2), 2)  # three graded samples give no pass@4
    assert two.standard_error == pytest.approx(statistics.stdev([0.5, 0, 1]) / 3**0.5)


# --- pass@1


def test_pass_at_1_is_the_mean_of_the_problems_and_its_error_counts_problems_not_samples():
    table = {"a": [[1, 1], [0, 1], [0, 0], [None, 1], [None, None]]}
    (result,) = results(groups_of(table))
    means = [1, 0.5, 0, 1]
    assert result.pass_at_1 == pytest.approx(statistics.mean(means))
    assert result.standard_error == pytest.approx(statistics.stdev(means) / 2)
    assert result.runs == (pytest.approx(1 / 3), pytest.approx(3 / 4))  # of the graded samples of each run
    assert (result.problems, result.samples, result.ungraded) == (5, 10, 3)


def test_correct_is_the_verifiers_word_and_the_reward_only_a_reward():
    """Near misses get a part, a long correct answer loses some, and a bonus makes more than 1 of another."""
    rewards, reasons = [0.4, 0.7, 1.1, -0.5], ["wrong", "correct", "correct", "no_answer"]
    rows = [
        trajectory("a", 0, i, reward, 3, 2, valid=True, reason=reason)
        for i, (reward, reason) in enumerate(zip(rewards, reasons, strict=True))
    ]
    group = encode(rows, k=K)
    (result,) = results([group])
    assert result.pass_at_1 == 0.5
    assert result.mean_reward == pytest.approx(statistics.mean(rewards))
    assert result.runs == (0.0, 1.0, 1.0, 0.0)
    assert result.other_rewards
    assert result.metrics()["a/mean_reward"] == result.mean_reward
    (one, two) = sampled([group], [1, 2])["a"]
    assert (one.value, two.value) == (0.5, pytest.approx(1 - 1 / 6))
    (usual,) = results(groups_of({"a": [[1, 0], [None, 1]]}))
    assert not usual.other_rewards


def test_lengths_count_invalid_samples_and_split_off_the_latent_part():
    rows = [trajectory("a", 0, 0, 1.0, latent=3, hard=2, valid=True), trajectory("a", 0, 1, 0.0, 9, 0, valid=False)]
    (result,) = results([encode(rows, k=K)])
    assert (result.chain_length, result.latent_length, result.invalid_rate) == (7.0, 6.0, 0.5)


def test_tasks_are_kept_apart_unless_asked_for_together():
    table = {"a": [[1], [1]], "b": [[0], [1]]}
    assert [(r.task, r.pass_at_1) for r in results(groups_of(table))] == [("a", 1.0), ("b", 0.5)]
    assert [(r.task, r.pass_at_1) for r in results(groups_of(table), together="all")] == [("all", 0.75)]


def test_interval_holds_the_truth_in_about_95_of_100_evaluations():
    random = np.random.RandomState(0)
    for chance, problems, runs in ((0.5, 200, 3), (0.9, 60, 5), (0.02, 100, 2)):
        held = 0
        for _ in range(1000):
            # problems differ in difficulty: samples of one problem are not independent observations
            difficulty = random.beta(chance * 4, (1 - chance) * 4, problems)
            means = random.binomial(runs, difficulty) / runs
            error = means.std(ddof=1) / problems**0.5
            low, high = interval(means.mean(), error, problems)
            held += low <= chance <= high
        assert 0.92 <= held / 1000 <= 0.99


def test_interval_of_a_perfect_score_is_not_a_point():
    low, high = interval(1.0, 0.0, 30)
    assert high == 1.0
    assert 0.85 < low < 0.95  # "30 of 30" is not a proof of 100 %
    assert interval(0.0, 0.0, 0) == (0.0, 1.0)


def test_every_task_weighs_the_same_in_the_macro_average():
    table = {"a": [[1], [1], [1], [0]], "b": [[0], [1]]}
    a, b = results(groups_of(table))
    macro = macro_average([a, b])
    assert macro.pass_at_1 == pytest.approx((0.75 + 0.5) / 2)
    assert macro.standard_error == pytest.approx((a.standard_error**2 + b.standard_error**2) ** 0.5 / 2)
    assert (macro.problems, macro.runs) == (6, (pytest.approx(0.625),))


def test_stored_figures_have_the_same_macro_average():
    table = {"a": [[1], [1], [1], [0]], "b": [[0], [1], [None]]}
    at_k = sampled(groups_of({"a": [[1, 0, 0, 1], [0, 0, 0, 1]], "b": [[1, 1, 0, 0]]}), [1, 2])
    found = [dataclasses.replace(r, pass_at_k=at_k[r.task]) for r in results(groups_of(table))]
    found[1] = dataclasses.replace(found[1], pass_at_k=found[1].pass_at_k[:1])  # pass@2 of one task only
    stored = {name: value for result in found for name, value in result.metrics().items()}
    averaged = average([*by_label(stored).values()])
    assert averaged == macro_average(found).figures()
    assert "sampled_pass_at_1" in averaged
    assert "sampled_pass_at_2" not in averaged
    assert averaged["ungraded"] == 1.0
