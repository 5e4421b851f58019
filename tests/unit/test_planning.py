"""A plan: the simulated loop holds what queues must hold, rates are a run's own, and what is not known is not said."""

from __future__ import annotations

import pytest

from latent_grpo.common.config import ConfigError, load_config
from latent_grpo.deploy.planning.plan import plan, stages
from latent_grpo.deploy.planning.rates import DEVICES, rates_of
from latent_grpo.deploy.planning.simulation import Times, driver_speed, growth, simulate


def settings(**keys):
    task = {"name": "t", "path": "builtin:chain_arithmetic", "max_prompt_tokens": 9, "max_response_tokens": 9}
    base = {"model": {"new": {}}, "tasks": [task], "group_size": 2, "prompts_per_step": 8, "minibatch_prompts": 8}
    return load_config({**base, "checkpoint": {"keep_best": None}, **keys})


def test_without_staleness_a_step_is_its_rollouts_then_the_learner_then_the_publication():
    times = Times(group_s=1.0, side_by_side=2, learner_s=3.0, publish_s=0.5, spread=0.0)
    found = simulate(settings(), times, workers=2)  # eight groups, four at once: two rounds
    assert found.step_s == pytest.approx(2.0 + 3.0 + 0.5, rel=1e-6)
    assert found.learner_waits == pytest.approx(2.5 / 5.5, rel=1e-6)
    assert found.workers_busy == pytest.approx(2.0 / 5.5, rel=1e-6)


def test_with_staleness_rollouts_hide_behind_a_slower_learner():
    times = Times(group_s=1.0, side_by_side=2, learner_s=3.0, spread=0.0)
    found = simulate(settings(max_staleness=1), times, workers=2)
    assert found.step_s == pytest.approx(3.0, rel=0.02)
    assert found.learner_waits < 0.02


def test_more_workers_bring_more_until_the_driver_is_the_limit():
    times = Times(group_s=1.0, side_by_side=1, learner_s=0.0, driver_group_s=0.05, spread=0.0)
    grown = [found.groups_per_s for found in growth(settings(), times, most=64)]
    assert grown == sorted(grown)
    assert grown[2] == pytest.approx(4 * grown[0], rel=0.2)  # four workers are no load for the driver
    assert grown[-1] <= 1 / 0.05
    assert grown[-1] > 0.8 / 0.05


def test_the_drivers_own_code_is_measured():
    assert driver_speed(workers=2, steps=2) > 0


def test_a_stage_takes_what_its_rate_says_and_half_with_twice_the_actors():
    rates = DEVICES["cpu"]
    one, two = (stages(settings(rollout={"workers": n}, learner={"ranks": n}), rates.parameters, rates) for n in (1, 2))
    response = 9 * rates.response_share
    assert one.rollout_s == pytest.approx(16 * response / rates.worker_steps_per_s)
    assert (two.rollout_s, two.learner_s) == pytest.approx((one.rollout_s / 2, one.learner_s / 2))
    larger = stages(settings(), 2 * rates.parameters, rates)
    assert larger.learner_s == pytest.approx(2 * one.learner_s)


def test_no_time_is_said_for_a_device_on_which_no_run_was_measured():
    rows = dict(plan(settings(), gpus=8, gpu="h100"))
    assert "--rates RUN" in rows["times"]
    assert "hours" not in rows
    assert "samples of 18 tokens fit" in rows["KV-cache slots"]
    assert "2 gradients, 5 optimizer" in rows["memory of a learner rank, RL"]


def test_on_the_cpu_a_plan_has_stages_balance_and_hours():
    rows = dict(plan(settings()))
    assert {"rollouts of a step", "learner's step", "publication", "waiting", "balance", "hours"} <= rows.keys()


def test_bad_input_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match=r"--gpu h1000: not known; give one of .*h100"):
        plan(settings(), gpus=1, gpu="h1000")
    with pytest.raises(ConfigError, match=r"--rates .*no metrics\.jsonl there"):
        rates_of(tmp_path)


@pytest.mark.parametrize("key", ["prompts_per_step", "max_staleness", "group_size"])
def test_a_plan_of_absurd_numbers_is_refused_before_it_is_simulated(key):
    with_it = {"prompts_per_step": {"minibatch_prompts": 10**9}, "group_size": {"rollout": {"max_rows": 10**9}}}
    config = settings(**{key: 10**9, **with_it.get(key, {})})
    with pytest.raises(ConfigError, match=f"{key} 1,000,000,000.*more than a plan simulates"):
        stages(config, 10**6, DEVICES["cpu"])


def test_what_cannot_be_simulated_has_its_memory_all_the_same():
    large = settings(prompts_per_step=400_000, minibatch_prompts=400_000)
    rows = dict(plan(large))
    assert "more than a plan simulates" in rows["times"]
    assert rows["memory of a rollout worker"].startswith("about ")


def test_large_batches_are_simulated_in_fewer_steps():
    found = stages(settings(prompts_per_step=10_000, minibatch_prompts=10_000), 10**6, DEVICES["cpu"])
    assert found.simulated.step_s > 0
