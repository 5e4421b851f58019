"""The loop with a simulated pool and learner: order, versions and staleness, whatever the timing."""

import dataclasses
import random
import signal

import numpy as np
import pyarrow as pa
import pytest

from latent_grpo.common.config import load_config
from latent_grpo.common.interrupts import Interrupted, deferred_interrupts
from latent_grpo.common.schema import encode
from latent_grpo.common.types import GroupRequest, Trajectory
from latent_grpo.deploy.controller import Controller, TrainingStopped, gather
from latent_grpo.deploy.run.problems import sampling_settings

BASE = {"model": {"path": "x"}, "tasks": [{"name": "t", "path": "t.jsonl"}], "k": 2, "group_size": 2}


def config(**changes):
    return load_config({**BASE, "prompts_per_step": 4, "minibatch_prompts": 2, **changes})


class SimulatedPool:
    """Returns a few groups a poll, in an arbitrary order, each at the version it was dispatched at."""

    def __init__(self, reward_of, seed=0):
        self.reward_of, self.random, self.version = reward_of, random.Random(seed), None
        self.todo, self.published = [], []

    def publish(self, publication):
        self.version = publication
        self.published.append(publication)

    def submit(self, requests):
        self.todo += [(r, self.version) for r in requests]

    def poll(self, timeout_s):
        self.random.shuffle(self.todo)
        done, self.todo = self.todo[:3], self.todo[3:]
        return [encode([self.sample(r, v, i) for i in r.sample_indices], 2) for r, v in done]

    def sample(self, r, version, index):
        reward = self.reward_of(int(r.problem_uid), index)
        return Trajectory(
            purpose="training", task="t", problem_uid=r.problem_uid, group_uid=r.group_uid, sample_index=index,
            epoch=0, run_seed=0, policy_version_min=version, policy_version_max=version, engine="simulated",
            sampling=r.sampling, prompt_ids=r.prompt_ids, latent_ids=np.zeros((1, 2), np.int32),
            latent_scores=np.zeros((1, 2), np.float32), latent_log_probs=np.zeros((1, 2), np.float32),
            hard_ids=np.zeros(2, np.int32), hard_log_probs=np.zeros(2, np.float32), finish_reason="stop",
            reward=reward, grade_reason="ungraded" if reward is None else "correct" if reward else "wrong",
        )  # fmt: skip


class SimulatedLearner:
    """Takes a few polls for a step; remembers what it was given."""

    def __init__(self, looks=3):
        self.batches, self.looks, self.left = [], looks, 0

    def start_step(self, batch, step):
        self.batches.append((step, batch))
        self.left = self.looks

    def finished(self):
        self.left -= 1
        return self.left <= 0

    def finish_step(self):
        return {"learner/loss": 0.0}

    def publish(self, version):
        return version


def request(ordinal, cfg):
    return GroupRequest(
        group_uid=f"g{ordinal}", problem_uid=str(ordinal), task="t", prompt_ids=np.zeros(2, np.int32),
        sample_indices=(0, 1), sampling=sampling_settings(cfg, 4), purpose="training", epoch=0,
        run_seed=0, verifier="math", gold_answer="1",
    )  # fmt: skip


def run(cfg, steps, reward_of, seed=0, **state):
    pool, learner = SimulatedPool(reward_of, seed), SimulatedLearner()
    controller = Controller(cfg, pool, learner, lambda ordinals: [request(o, cfg) for o in ordinals], **state)
    controller.begin()
    results = [controller.run_step() for _ in range(steps)]
    return results, pool, learner, controller


def mixed(problem, index):
    return float(index) if problem % 3 else 1.0  # every third group has no signal


def trained_on(learner):
    return [batch.column("problem_uid").to_pylist()[::2] for _, batch in learner.batches]


@pytest.mark.parametrize("staleness", [0, 1])
@pytest.mark.parametrize("sampling", ["refill", "drop"])
def test_what_is_trained_on_does_not_depend_on_timing(staleness, sampling):
    cfg = config(max_staleness=staleness, dynamic_sampling=sampling)
    assert len({str(trained_on(run(cfg, 4, mixed, seed)[2])) for seed in range(4)}) == 1


@pytest.mark.parametrize("staleness", [0, 1, 2])
def test_no_group_is_older_than_max_staleness(staleness):
    results, _, learner, _ = run(config(max_staleness=staleness), 6, mixed)
    ages = [step - v for step, b in learner.batches for v in b.column("policy_version_min").to_pylist()]
    assert max(ages) == min(staleness, 5)
    assert max(r.metrics["batch/staleness_max"] for r in results) == max(ages)
    assert min(ages) >= 0


def test_every_version_is_published_once_and_before_its_work():
    results, pool, _, _ = run(config(), 3, mixed)
    assert pool.published == [0, 1, 2, 3]
    assert [r.step for r in results] == [1, 2, 3]


def test_refill_fills_every_batch_and_drop_trains_on_what_has_signal():
    _, _, refilled, _ = run(config(), 3, mixed)
    assert trained_on(refilled)[0] == ["1", "2", "4", "5"]
    _, _, dropped, _ = run(config(dynamic_sampling="drop"), 2, mixed)
    assert trained_on(dropped) == [["1", "2"], ["4", "5", "7"]]


def test_a_step_without_signal_is_skipped_and_counted():
    results, pool, learner, _ = run(config(dynamic_sampling="drop"), 2, lambda problem, index: 1.0)
    assert learner.batches == []
    assert results[0].batch is None
    assert results[0].metrics["batch/dropped_all_equal"] == 4
    assert results[0].metrics["batch/zero_variance_share"] == 1.0
    assert results[0].reasons == ("all_equal",) * 4
    assert pool.published == [0, 1, 2]  # a version a step: the key of a draw names it (METHOD §2.5)


@pytest.mark.parametrize("sampling", ["refill", "drop"])
def test_a_resumed_run_goes_on_with_the_same_prompts(sampling):
    cfg = config(dynamic_sampling=sampling)
    _, _, learner, _ = run(cfg, 6, mixed)
    first = run(cfg, 3, mixed, seed=5)[3]
    _, pool, resumed, _ = run(cfg, 3, mixed, seed=9, step=first.step, next_ordinal=first.next_ordinal)
    assert trained_on(resumed) == trained_on(learner)[3:]
    assert pool.published[0] == 3


class LatePool(SimulatedPool):
    """Every fifth group arrives only when nothing else is under way, and is longer."""

    def poll(self, timeout_s):
        quick = [todo for todo in self.todo if int(todo[0].problem_uid) % 5]
        done = quick[:2] or self.todo[:1]
        self.todo = [todo for todo in self.todo if all(todo is not of for of in done)]
        return [encode([self.sample(r, v, i) for i in r.sample_indices], 2) for r, v in done]

    def sample(self, r, version, index):
        made = super().sample(r, version, index)
        hard = 9 if int(r.problem_uid) % 5 == 0 else 2
        return dataclasses.replace(made, hard_ids=np.zeros(hard, np.int32), hard_log_probs=np.zeros(hard, np.float32))


def test_a_window_passes_over_what_is_late_shows_the_bias_and_a_resumed_run_takes_it():
    cfg = config(max_staleness=1, batch_window=4)

    def steps(count, **state):
        pool, learner = LatePool(lambda problem, index: float(index)), SimulatedLearner()
        controller = Controller(cfg, pool, learner, lambda ordinals: [request(o, cfg) for o in ordinals], **state)
        controller.begin()
        return [controller.run_step() for _ in range(count)], learner, controller

    results, learner, controller = steps(3)
    assert trained_on(learner)[:2] == [["1", "2", "3", "4"], ["0", "6", "7", "8"]]
    shown = results[1].metrics
    assert (shown["batch/passed_groups"], shown["batch/passed_steps"], shown["batch/in_order_steps"]) == (1, 10, 3)
    assert results[0].metrics["batch/passed_groups"] == 0
    assert max(r.metrics["batch/staleness_max"] for r in results) <= cfg.max_staleness + 1
    assert controller.ahead
    state = {"step": 3, "next_ordinal": controller.next_ordinal, "ahead": controller.ahead}
    again = steps(3, **state)[1]
    both = [uid for batch in trained_on(learner) + trained_on(again) for uid in batch]
    assert len(set(both)) == len(both) == 24
    assert set(map(str, range(20))) <= set(both)


def test_metrics_describe_all_that_arrived_not_only_what_was_trained_on():
    results, _, _, _ = run(config(dynamic_sampling="drop"), 1, mixed)
    assert results[0].metrics["rollout/samples"] == 8
    assert results[0].metrics["rollout/reward"] == pytest.approx(6 / 8)
    assert results[0].metrics["rollout/latent_steps"] == 1
    assert results[0].metrics["rollout/steps"] == 3


def test_too_many_ungraded_samples_stop_the_run_and_are_never_reward_zero():
    with pytest.raises(TrainingStopped, match="could not be graded"):
        run(config(dynamic_sampling="drop"), 1, lambda problem, index: None)


def test_gather_returns_groups_in_order_and_hands_on_what_was_not_asked_for():
    cfg = config()
    pool = SimulatedPool(mixed)
    pool.publish(0)
    pool.submit([request(99, cfg)])
    others = []
    groups = gather(pool, [request(i, cfg) for i in (5, 3, 8)], on_others=others.extend)
    assert [g.column("group_uid")[0].as_py() for g in groups] == ["g5", "g3", "g8"]
    assert [g.column("group_uid")[0].as_py() for g in others] == ["g99"]


@pytest.mark.parametrize("moment", ["start_step", "finished"])
def test_an_interrupt_in_the_learners_step_settles_to_the_state_after_it(moment):
    cfg = config()
    pool, learner = SimulatedPool(mixed), SimulatedLearner()
    controller = Controller(cfg, pool, learner, lambda ordinals: [request(o, cfg) for o in ordinals])
    controller.begin()
    interrupt_in(learner, moment)
    with pytest.raises(Interrupted), deferred_interrupts():
        controller.run_step()
    assert controller.step == 0
    result = controller.settle(5.0)
    assert (controller.step, controller.next_ordinal) == (1, 6)
    assert (result.step, result.metrics["learner/loss"]) == (1, 0.0), "its metrics and dump are not lost"
    assert result.reasons == ("all_equal", None, None, "all_equal", None, None)
    assert controller.settle(5.0) is None  # nothing to settle any more
    assert controller.step == 1


def test_a_step_that_does_not_end_after_an_interrupt_is_left_alone_and_known_to_run():
    cfg = config()
    pool, learner = SimulatedPool(mixed), SimulatedLearner(looks=10**9)
    controller = Controller(cfg, pool, learner, lambda ordinals: [request(o, cfg) for o in ordinals])
    controller.begin()
    interrupt_in(learner, "start_step")
    with pytest.raises(Interrupted), deferred_interrupts():
        controller.run_step()
    assert controller.settle(0.0) is None
    assert (controller.learning, controller.step, controller.next_ordinal) == (True, 0, 0)


@pytest.mark.parametrize("staleness", [0, 1, 2])
@pytest.mark.parametrize("moment", ["finish_step", "publish"])
def test_an_interrupt_once_the_learner_is_done_lets_the_step_end_and_begins_no_other(moment, staleness):
    cfg = config(max_staleness=staleness)
    pool, learner = SimulatedPool(mixed), SimulatedLearner(looks=30)  # so slow that the next batch is there before it
    controller = Controller(cfg, pool, learner, lambda ordinals: [request(o, cfg) for o in ordinals])
    controller.begin()
    results = []
    interrupt_in(learner, moment)
    with pytest.raises(Interrupted), deferred_interrupts():
        results.extend(controller.run_step() for _ in range(2))
    assert [result.step for result in results] == [1]
    assert controller.settle(5.0) is None, "no second step was begun"
    assert (controller.step, len(learner.batches)) == (1, 1)


def test_an_interrupt_while_groups_are_waited_for_begins_no_step():
    cfg = config()
    pool, learner = SimulatedPool(mixed), SimulatedLearner()
    controller = Controller(cfg, pool, learner, lambda ordinals: [request(o, cfg) for o in ordinals])
    controller.begin()
    interrupt_in(pool, "submit")
    with pytest.raises(Interrupted), deferred_interrupts():
        controller.run_step()
    assert controller.settle(5.0) is None
    assert (controller.step, learner.batches) == (0, [])


def test_an_interrupt_while_an_evaluation_is_gathered_is_taken_there():
    cfg = config()
    pool = SimulatedPool(mixed)
    pool.publish(0)
    interrupt_in(pool, "submit")
    with pytest.raises(Interrupted), deferred_interrupts():
        gather(pool, [request(i, cfg) for i in range(50)])
    assert pool.todo, "it did not wait for the rest"


def interrupt_in(service, method):
    """Ctrl-C in the middle of the next call."""
    original = getattr(service, method)

    def call(*arguments):
        setattr(service, method, original)
        signal.raise_signal(signal.SIGINT)
        return original(*arguments)

    setattr(service, method, call)


def without_scores(group):
    return group.drop_columns(["latent_scores"])


def with_offsets_beyond_the_values(group):
    field, offsets = group.schema.field("hard_ids"), np.array([0, 2, 4], np.int32)
    values = pa.array([0] * 4, pa.int32())
    column = pa.ListArray.from_buffers(field.type, 2, [None, pa.py_buffer(offsets)], children=[values])
    offsets[:] = [0, 2, 10**6]  # after Arrow has looked at them
    return group.set_column(group.schema.get_field_index(field.name), field, column)


@pytest.mark.parametrize("sampling", ["refill", "drop"])
@pytest.mark.parametrize("damaged", [without_scores, with_offsets_beyond_the_values])
def test_malformed_records_are_dropped_and_counted_and_never_guessed(sampling, damaged):
    class OldWorker(SimulatedPool):
        def poll(self, timeout_s):
            return [damaged(group) if self.random.random() < 0.3 else group for group in super().poll(timeout_s)]

    cfg = config(dynamic_sampling=sampling)
    pool, learner = OldWorker(lambda problem, index: float(index)), SimulatedLearner()
    controller = Controller(cfg, pool, learner, lambda ordinals: [request(o, cfg) for o in ordinals])
    controller.begin()
    results = [controller.run_step() for _ in range(6)]
    dropped = sum(r.metrics.get("batch/dropped_malformed", 0) for r in results)
    kept = sum(r.metrics["batch/groups"] for r in results)
    assert dropped > 0
    assert kept == 24 if sampling == "refill" else kept + dropped == 24
    assert all("latent_scores" in batch.schema.names for _, batch in learner.batches)


def test_a_step_of_nothing_but_malformed_records_stops_the_run():
    class Foreign(SimulatedPool):
        def poll(self, timeout_s):
            return [group.drop_columns(["hard_ids"]) for group in super().poll(timeout_s)]

    cfg = config(dynamic_sampling="drop")
    controller = Controller(
        cfg, Foreign(mixed), SimulatedLearner(), lambda ordinals: [request(o, cfg) for o in ordinals]
    )
    controller.begin()
    with pytest.raises(TrainingStopped, match="same version of this program"):
        controller.run_step()
