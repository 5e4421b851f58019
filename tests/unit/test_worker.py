"""The worker's invariants, with a scripted engine in place of a model: no Ray, no torch model, no waiting."""

import dataclasses

import numpy as np
import pytest
import torch
from weight_buckets import pack

from latent_grpo.common.schema import decode, groups_of
from latent_grpo.common.types import GroupRequest, PolicyVersion, SamplingSettings, Trajectory
from latent_grpo.common.weights import WeightManifest, WeightsCorrupt, checksum
from latent_grpo.reward.pool import VerifierPool
from latent_grpo.rollout_workers.engine import EngineError
from latent_grpo.rollout_workers.worker import RolloutWorker

SAMPLING = SamplingSettings(mode="visible", max_tokens=4, k=2)


class ScriptedEngine:
    """Finishes the oldest group at every second step; `answer` is the version it samples with."""

    name = "scripted"

    def __init__(self):
        self.version, self.groups, self.steps = PolicyVersion(version=0, checksum=""), [], 0
        self.closed = False

    @property
    def pending(self):
        return sum(len(g.sample_indices) for g in self.groups)

    def add(self, request):
        self.groups.append(request)

    def step(self):
        self.steps += 1
        return [self.finish(self.groups.pop(0))] if self.steps % 2 == 0 else []

    def finish(self, r):
        return tuple(
            Trajectory(
                purpose=r.purpose, task=r.task, problem_uid=r.problem_uid, group_uid=r.group_uid, sample_index=i,
                epoch=0, run_seed=0, policy_version_min=self.version.version, policy_version_max=self.version.version,
                engine=self.name, sampling=r.sampling, prompt_ids=r.prompt_ids, gold_answer=r.gold_answer,
                latent_ids=np.zeros((0, 2), np.int32), latent_scores=np.zeros((0, 2), np.float32),
                latent_log_probs=np.zeros((0, 2), np.float32), hard_ids=np.array([i], np.int32),
                hard_log_probs=np.zeros(1, np.float32), finish_reason="stop",
            )
            for i in r.sample_indices
        )  # fmt: skip

    def load_weights(self, version, tensors, unchanged=()):
        if self.pending:
            raise EngineError("running")
        if version.checksum != checksum(tensors):
            raise EngineError("checksum")
        self.version = version

    def close(self):
        self.closed = True


def request(uid, samples=2):
    return GroupRequest(
        group_uid=uid, problem_uid=f"t/{uid}", task="t", prompt_ids=np.array([1], np.int32),
        sample_indices=tuple(range(samples)), sampling=SAMPLING, purpose="training", epoch=0, run_seed=0,
        verifier="number", gold_answer="1",
    )  # fmt: skip


def publication(version, value=1.0):
    weights = [("w", torch.full((4,), value))]
    buckets = list(pack(weights, 1024))
    policy = PolicyVersion(version=version, checksum=checksum(weights))
    return WeightManifest(version=policy, buckets=tuple(m for m, _ in buckets)), [data for _, data in buckets]


def worker_with(engine):
    return RolloutWorker(
        "w0", engine, VerifierPool(processes=1), lambda ids, reason: rf"\boxed{{{ids[0]}}}", k=2, run_id="r"
    )


@pytest.fixture
def engine():
    return ScriptedEngine()


@pytest.fixture
def worker(engine):
    made = worker_with(engine)
    yield made
    made.stop()


def take(worker, count):
    results, groups = worker.results(), []
    while len(groups) < count:
        groups += [decode(group) for _, group in groups_of(next(results))]
    return groups


def test_groups_come_back_whole_graded_and_signed(worker):
    worker.submit(0, [request("a"), request("b", samples=3)])
    a, b = take(worker, 2)
    assert [t.group_uid for t in (*a, *b)] == ["a", "a", "b", "b", "b"]
    assert [t.reward for t in b] == [0.0, 1.0, 0.0]  # the text is the sample's index, the gold answer 1
    assert {(t.worker, t.run_id, t.grade_reason) for t in a} == {
        ("w0", "r", "wrong"),
        ("w0", "r", "correct"),
    }


class AtOnceEngine(ScriptedEngine):
    def step(self):
        ended, self.groups = self.groups, []
        return [self.finish(group) for group in ended]


def test_groups_that_end_together_travel_together():
    """A batch costs milliseconds, whatever it holds; 512 groups of one sample took 2.6 s with one batch each."""
    worker = worker_with(AtOnceEngine())
    worker.submit(0, [request(str(i), samples=1) for i in range(200)])
    results, arrived, batches = worker.results(), [], 0
    while len(arrived) < 200:
        arrived += [uid for uid, _ in groups_of(next(results))]
        batches += 1
    assert arrived == [str(i) for i in range(200)]
    worker.stop()
    assert batches < 200


class AbortingEngine(ScriptedEngine):
    def finish(self, r):
        *rest, last = super().finish(r)
        return (*rest, dataclasses.replace(last, finish_reason="aborted"))


def test_an_aborted_sample_is_never_graded_and_the_others_keep_their_grades():
    worker = worker_with(AbortingEngine())
    worker.submit(0, [request("a", samples=3)])
    ((first, second, aborted),) = take(worker, 1)
    worker.stop()
    assert [(t.reward, t.grade_reason) for t in (first, second)] == [(0.0, "wrong"), (1.0, "correct")]
    assert (aborted.reward, aborted.grade_reason) == (None, "ungraded")


def test_a_weight_update_takes_its_turn_in_the_queue(worker):
    worker.submit(2, [request("c"), request("d")])  # calls to an actor may overtake each other
    worker.update_weights(1, *publication(7))
    worker.submit(0, [request("a"), request("b")])
    groups = take(worker, 4)
    assert worker.status().version.version == 7
    assert {t.group_uid: t.policy_version_min for g in groups for t in g} == {"a": 0, "b": 0, "c": 7, "d": 7}


def test_a_worker_that_cannot_verify_its_weights_stops(worker):
    manifest, ((data,),) = publication(1)
    damaged = data.copy()
    damaged[0] ^= 1
    worker.update_weights(0, manifest, [[damaged]])
    worker.submit(1, [request("a")])
    with pytest.raises(EngineError, match="checksum"):
        list(worker.results())
    assert worker.status().version.version == 0


def test_weights_that_were_cut_short_are_refused_before_the_engine_sees_them(worker):
    manifest, ((data,),) = publication(1)
    worker.update_weights(0, manifest, [[data[:-1]]])
    with pytest.raises(WeightsCorrupt, match="expected 16 bytes, got 15"):
        list(worker.results())


def test_the_engine_learns_which_weights_it_has_been_given_before(worker, engine):
    seen = []
    load = engine.load_weights
    engine.load_weights = lambda version, tensors, unchanged: (seen.append(list(unchanged)), load(version, tensors))
    for version, value in enumerate([1.0, 1.0, 2.0]):
        worker.update_weights(2 * version, *publication(version, value))
        worker.submit(2 * version + 1, [request(f"g{version}")])
    take(worker, 3)
    assert seen == [[], ["w"], []]


def test_weights_that_nothing_is_made_with_are_not_loaded(worker, engine):
    loaded = []
    load = engine.load_weights
    engine.load_weights = lambda version, *rest: (loaded.append(version.version), load(version, *rest))
    worker.submit(0, [request("a")])
    for ticket in (1, 2, 3):
        worker.update_weights(ticket, *publication(ticket))
    worker.submit(4, [request("b")])
    worker.update_weights(5, *publication(5))
    groups = take(worker, 2)
    assert loaded[0] == 3
    assert [group[0].policy_version_min for group in groups] == [0, 3]


def test_an_engine_that_disagrees_about_the_checksum_never_samples(worker):
    manifest, buckets = publication(1)
    other = WeightManifest(version=PolicyVersion(version=1, checksum="wrong"), buckets=manifest.buckets)
    worker.update_weights(0, other, buckets)
    worker.submit(1, [request("a")])
    with pytest.raises(EngineError, match="checksum"):
        list(worker.results())


def test_status_shows_progress_and_work_left(worker):
    worker.submit(0, [request("a"), request("b")])
    before = worker.status()
    assert (before.queued, before.progress) == (2, 0)
    take(worker, 2)
    after = worker.status()
    assert after.queued == after.pending_samples == 0
    assert after.progress > before.progress


def test_discarded_groups_are_not_delivered_and_the_same_group_may_come_again(worker):
    worker.submit(0, [request("a"), request("b")])
    results = worker.results()
    assert decode(next(results))[0].group_uid == "a"
    worker.submit(1, [request("c")])
    worker.discard(2)
    worker.update_weights(3, *publication(7))
    worker.submit(4, [request("b")])
    assert next(results).num_rows == 0  # what was there before is forgotten now
    again = decode(next(results))
    assert [(t.group_uid, t.policy_version_min) for t in again] == [("b", 7), ("b", 7)]
    assert worker.status().queued == worker.status().pending_samples == 0


def test_status_says_that_weights_are_loading_and_how_long_the_worker_has_worked(worker, engine):
    seen = []
    load = engine.load_weights
    engine.load_weights = lambda *of: (seen.append(worker.status()), load(*of))
    worker.update_weights(0, *publication(7))
    worker.submit(1, [request("a")])
    take(worker, 1)
    assert [(s.loading, s.last_event) for s in seen] == [(True, "loads weights of version 7")]
    assert not worker.status().loading
    assert worker.status().busy_s > 0


def test_stop_ends_the_stream_and_closes_engine_and_graders(worker, engine):
    worker.submit(0, [request("a")])
    results = worker.results()
    next(results)
    worker.stop()
    assert list(results) == []
    assert engine.closed
