"""The pool on a real Ray: whatever happens to workers, every group arrives, and on the right weights."""

import functools
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from latent_grpo.common.config import ActorResources, ConfigError, DeadlineConfig, RolloutConfig
from latent_grpo.common.schema import decode
from latent_grpo.common.seen_time import SeenTime
from latent_grpo.common.transport import ObjectStoreTransport
from latent_grpo.common.types import GroupRequest, SamplingSettings
from latent_grpo.learner.publication import Publisher
from latent_grpo.rollout_workers.pool import RolloutPool, RolloutPoolError

pytestmark = pytest.mark.integration
SAMPLING = SamplingSettings(mode="latent", max_tokens=6, k=2)
HERE = {"PYTHONPATH": str(Path(__file__).parent)}  # actors import the factory below
DEADLINES = DeadlineConfig(start_s=300, rollout_s=120, weights_s=120)


def make_worker(name):
    """Runs in the actor: a real engine on a tiny model."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    from latent_grpo.common.types import TokenFacts
    from latent_grpo.reward.pool import VerifierPool
    from latent_grpo.rollout_workers.transformers_engine import TransformersEngine
    from latent_grpo.rollout_workers.worker import RolloutWorker

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_config(tiny_config(LlamaConfig), attn_implementation="sdpa")
    facts = TokenFacts(vocab_size=32, allowed=np.ones(32, bool), latent_end_id=5, eos_ids=(1,), pad_id=0)
    engine = TransformersEngine(model, facts)
    return RolloutWorker(name, engine, VerifierPool(processes=1), lambda ids, reason: str(ids), k=2, run_id="run")


def tiny_config(llama):
    return llama(
        vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        initializer_range=0.05,
    )  # fmt: skip


def publication(version):
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(version)
    model = AutoModelForCausalLM.from_config(tiny_config(LlamaConfig))
    weights = [(n, p.detach()) for n, p in model.named_parameters()]
    return Publisher(ObjectStoreTransport(), 8192).publish(weights, version)


def requests(first, count):
    return [
        GroupRequest(
            group_uid=f"g{i}", problem_uid=f"t/{i}", task="t", prompt_ids=np.full(2 + i % 5, 7, np.int32),
            sample_indices=(0, 1, 2), sampling=SAMPLING, purpose="training", epoch=0, run_seed=0,
            verifier="number", gold_answer="1",
        )
        for i in range(first, first + count)
    ]  # fmt: skip


def collect(pool, count, timeout=600.0):
    groups, end = [], time.monotonic() + timeout
    while len(groups) < count:
        assert time.monotonic() < end, f"{len(groups)} of {count} groups after {timeout} s"
        groups += [decode(b) for b in pool.poll(0.5)]
    return groups


def two_workers(deadlines=DEADLINES):
    config = RolloutConfig(workers=2, resources=ActorResources(num_cpus=0.5), max_restarts=2)
    return RolloutPool(make_worker, config, deadlines, env_vars=HERE, heartbeat_s=0.5)


@pytest.fixture(scope="module")
def pool(ray_session):
    """Of tests that lose no worker: each says how many it begins with, and with which weights."""
    with two_workers() as made:
        yield made


@pytest.fixture
def mortal(ray_session):
    """A pool that soon notices a worker that stands still; yet a busy machine must not be taken for one."""
    with two_workers(DEADLINES.model_copy(update={"rollout_s": 10.0})) as made:
        made.wait_for(2)
        made.publish(publication(1))
        yield made


def a_process_of(pool):
    return next(iter(pool.process_ids().values()))


@pytest.mark.slow  # test_pool_faults kills workers too, of an engine that starts faster
def test_groups_of_a_killed_and_of_a_frozen_worker_all_arrive_once_and_on_current_weights(mortal, caplog):
    pool = mortal
    pool.submit(requests(0, 10))
    first = collect(pool, 10)
    assert {t.policy_version_min for g in first for t in g} == {1}
    assert len({t.worker for g in first for t in g}) == 2

    pool.publish(publication(2))
    pool.submit(requests(10, 80))  # more than a worker does ahead of the driver, so the killed one is not done
    os.kill(a_process_of(pool), signal.SIGKILL)
    second = collect(pool, 80)
    assert sorted(g[0].group_uid for g in second) == sorted(f"g{i}" for i in range(10, 90))
    assert {t.policy_version_max for g in second for t in g} == {2}  # the replacement too
    assert pool.restarts == 1
    pool.wait_for(2)

    os.kill(a_process_of(pool), signal.SIGSTOP)
    pool.submit(requests(90, 20))
    third = collect(pool, 20)
    assert sorted(g[0].group_uid for g in third) == sorted(f"g{i}" for i in range(90, 110))
    assert pool.restarts == 2
    assert "makes no progress: it did not write its stacks within 5 s; the kernel says: State: T" in caplog.text

    pool.submit(requests(110, 4))
    os.kill(a_process_of(pool), signal.SIGKILL)
    with pytest.raises(RolloutPoolError, match="max_restarts allows 2"):
        collect(pool, 100)


def test_scaling_in_mid_run_loses_nothing_and_joiners_start_on_current_weights(pool):
    pool.resize(2)
    pool.wait_for(2)
    pool.publish(publication(3))
    pool.submit(requests(0, 12))
    pool.resize(3)
    groups = []
    while pool.size < 3:
        groups += [decode(b) for b in pool.poll(0.5)]
    pool.submit(requests(12, 12))
    groups += collect(pool, 24 - len(groups))
    pool.resize(1)
    pool.submit(requests(24, 6))
    groups += collect(pool, 6)
    assert len({g[0].group_uid for g in groups}) == 30
    assert {t.policy_version_min for g in groups for t in g} == {3}
    assert len({t.worker for g in groups for t in g}) == 3
    assert (pool.size, pool.outstanding) == (1, 0)


def test_trajectories_do_not_depend_on_the_number_of_workers(pool):
    results = []
    pool.publish(publication(4))
    for workers in (1, 3):
        pool.resize(workers)
        pool.wait_for(workers)
        pool.submit(requests(0, 12))
        results.append({(t.group_uid, t.sample_index): t for g in collect(pool, 12) for t in g})
    one, three = results
    assert len({t.worker for t in three.values()}) == 3
    assert one.keys() == three.keys()
    for key, trajectory in one.items():
        assert np.array_equal(trajectory.latent_ids, three[key].latent_ids)
        assert np.array_equal(trajectory.hard_ids, three[key].hard_ids)
        np.testing.assert_allclose(trajectory.latent_scores, three[key].latent_scores, atol=1e-4)


def test_a_worker_that_is_lent_keeps_its_weights_while_the_others_go_on_with_new_ones(pool):
    pool.resize(2)
    pool.wait_for(2)
    pool.publish(publication(5))
    assert pool.lend()
    pool.submit_lent(requests(0, 6))
    pool.publish(publication(6))
    pool.submit(requests(10, 6))
    found = collect(pool, 12)
    lent, others = (
        [t for g in found for t in g if (int(g[0].group_uid[1:]) < 10) is of_loan] for of_loan in (True, False)
    )
    assert {(t.policy_version_min, t.policy_version_max) for t in lent} == {(5, 5)}
    assert {(t.policy_version_min, t.policy_version_max) for t in others} == {(6, 6)}
    assert [len({t.worker for t in of}) for of in (lent, others)] == [1, 1]

    pool.submit_lent(requests(20, 6))  # the worker leaves, and the other one takes its place with the weights of then
    pool.resize(1, at_once=True)
    pool.submit(requests(30, 3))
    left = collect(pool, 6)
    assert {t.policy_version_max for g in left for t in g} == {5}
    pool.end_loan()
    assert {t.policy_version_min for g in collect(pool, 3) for t in g} == {6}
    assert not pool.lend(), "one worker is not lent"


def make_nothing(reached, name):
    reached.touch()
    time.sleep(1200)


def test_a_worker_that_does_not_start_shows_its_stacks(ray_session, caplog, tmp_path):
    config, reached = RolloutConfig(workers=1, resources=ActorResources(num_cpus=0.1)), tmp_path / "reached"
    leaping = SeenTime(lambda: time.monotonic() * (1000 if reached.exists() else 1))  # once the worker hangs
    limits = DEADLINES.model_copy(update={"start_s": 0.9})
    with pytest.raises(RolloutPoolError, match=r"worker-0 failed to start: it did not start within 0\.9 s"):
        RolloutPool(functools.partial(make_nothing, reached), config, limits, env_vars=HERE, clock=leaping)
    assert "worker-0 makes no progress" in caplog.text
    assert "in make_nothing" in caplog.text


def make_unusable(name):
    raise ConfigError("model x changes what its output layer gives")


def test_a_worker_that_finds_a_setting_wrong_says_that_and_nothing_of_deadlines(ray_session):
    config = RolloutConfig(workers=1, resources=ActorResources(num_cpus=0.1))
    with pytest.raises(ConfigError, match=r"^rollout worker: model x changes what its output layer gives$"):
        RolloutPool(make_unusable, config, DEADLINES, env_vars=HERE)
