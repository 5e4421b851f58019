"""What happens to workers never holds up those that are well, and a driver's own pause is no fault of theirs."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import dead_node
import pytest
import ray
import scripted_worker
import torch
from test_rollout_pool import collect, publication, requests

from latent_grpo.common.collective import CollectiveTransport
from latent_grpo.common.config import ActorResources, DeadlineConfig, RolloutConfig
from latent_grpo.learner.publication import Publisher
from latent_grpo.rollout_workers.pool import RolloutPool, RolloutPoolError

pytestmark = pytest.mark.integration
HERE = {"PYTHONPATH": str(Path(__file__).parent)}


@pytest.fixture
def pool_of(ray_session, tmp_path):
    """`pool_of(workers, step_s=..., deadlines...)`: a pool of scripted workers on the weights of version 1."""
    made = []

    def make(workers, *, step_s=0.02, needs=0.1, max_restarts=5, **deadlines):
        config = RolloutConfig(
            workers=workers, resources=ActorResources(num_cpus=needs), max_restarts=max_restarts, max_rows=12
        )
        script = scripted_worker.Script(tmp_path, step_s)
        limits = DeadlineConfig(**{"start_s": 300, "rollout_s": 60, "weights_s": 60, **deadlines})
        made.append(RolloutPool(script, config, limits, env_vars=HERE, heartbeat_s=0.2))
        made[-1].publish(publication(1))
        return made[-1]

    yield make
    for pool in made:
        pool.close()


def kill(pool, *names):
    pids = pool.process_ids()
    for name in names:
        os.kill(pids[name], signal.SIGKILL)


def gone(pool, *names):
    """Polls until the pool knows of the deaths; returns the groups that came meanwhile."""
    groups, end = [], time.monotonic() + 60
    while pool.process_ids().keys() & set(names):
        assert time.monotonic() < end
        groups += pool.poll(0.1)
    return groups


def test_a_worker_that_is_lost_does_not_hold_up_the_others_and_losses_are_replaced_side_by_side(pool_of, tmp_path):
    pool = pool_of(3)
    pool.wait_for(3)
    replacements = ("worker-3", "worker-4")
    for name in replacements:
        (tmp_path / f"hold-{name}").touch()
    pool.submit(requests(0, 60))
    kill(pool, "worker-0", "worker-1")
    done = len(gone(pool, "worker-0", "worker-1"))
    collect(pool, 60 - done)  # while no replacement can be there
    assert pool.process_ids().keys() == {"worker-2"}
    while not all((tmp_path / f"held-{name}").exists() for name in replacements):  # one does not await the other
        pool.poll(0.1)
    for name in replacements:
        (tmp_path / f"hold-{name}").unlink()
    pool.wait_for(3)
    assert pool.process_ids().keys() == {"worker-2", *replacements}
    assert pool.restarts == 2


@pytest.mark.slow
def test_a_replacement_that_fails_is_started_again_and_the_first_worker_that_fails_ends_the_run(pool_of, tmp_path):
    pool = pool_of(2)
    pool.wait_for(2)
    (tmp_path / "fault-worker-2").write_text("no space on /scratch")
    kill(pool, "worker-0")
    gone(pool, "worker-0")
    pool.wait_for(2)
    assert pool.process_ids().keys() == {"worker-1", "worker-3"}
    assert pool.restarts == 2  # the loss, and the replacement that failed
    (tmp_path / "fault-worker-0").write_text("no such model")
    with pytest.raises(RolloutPoolError, match="worker-0 failed to start: OSError: no such model"):
        pool_of(1)


@pytest.mark.parametrize(
    ("fault", "said", "starts"),
    [
        pytest.param(
            "exit",
            "rollout worker-2 failed to start: its process ended: killed from outside",
            3,
            marks=pytest.mark.slow,
        ),  # the next ones are the same for a worker that is not tried again
        ("sys.exit", r"rollout worker-0 failed to start: RuntimeError: something .* exit code 'no licence'", 1),
        ("unpickle", r"rollout worker-0 failed to start: ImportError: libfoo.so is missing", 1),
    ],
)
def test_workers_that_die_at_once_are_the_reason_and_not_a_deadline(ray_session, fault, said, starts):
    factory = scripted_worker.Unloadable() if fault == "unpickle" else scripted_worker.Ending(fault)
    config = RolloutConfig(workers=1, resources=ActorResources(num_cpus=0.1), max_rows=12)
    with pytest.raises(RolloutPoolError, match=said) as refused:
        RolloutPool(factory, config, DeadlineConfig(start_s=300), env_vars=HERE)
    assert "did not start within" not in str(refused.value)
    assert f"worker-{starts - 1} " in str(refused.value)


def test_weights_that_wait_behind_long_work_and_a_driver_that_looks_away_are_no_faults(pool_of):
    pool = pool_of(1, step_s=0.5, rollout_s=2.0, weights_s=2.0)
    pool.submit(requests(0, 12))  # 6 s: longer than both deadlines
    for version in (2, 3, 4, 5):  # more than the actor has threads
        pool.publish(publication(version))
    pool.submit(requests(12, 1))
    groups = collect(pool, 5)
    time.sleep(8)  # the driver is stopped, or busy with a checkpoint
    groups += collect(pool, 8)
    assert pool.restarts == 0
    assert [group[0].policy_version_min for group in groups] == [1] * 12 + [5]


def test_a_pool_begins_with_the_room_there_is_and_grows_with_it(pool_of):
    other = ray.remote(Holder).options(num_cpus=3).remote()  # another job, on most of the four CPUs
    ray.get(other.there.remote())
    pool = pool_of(3, needs=1)
    pool.submit(requests(0, 6))
    assert {group[0].worker for group in collect(pool, 6)} == {"worker-0"}
    assert (pool.size, pool.wanted, pool.restarts) == (1, 3, 0)
    ray.kill(other)
    pool.wait_for(3)
    pool.submit(requests(6, 36))
    assert len({group[0].worker for group in collect(pool, 36)}) == 3


class Holder:
    def there(self):
        return True


def test_without_room_for_the_workers_that_it_needs_the_pool_says_what_is_missing(pool_of):
    with pytest.raises(RolloutPoolError, match=r"deadlines.place_s = 1.*each needs 64 CPU \(\S+ free\)"):
        pool_of(1, needs=64, place_s=1.0)


@pytest.mark.slow  # Ray takes its time to call a stopped node dead
def test_a_pool_whose_own_node_is_dead_says_so_instead_of_waiting_for_room(environment, tmp_path):
    """In a process of its own, which Ray may also end."""
    program = [sys.executable, dead_node.__file__, str(tmp_path)]
    ended = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert "RayLost: Ray's node of this process is dead" in ended.stdout, ended.stdout + ended.stderr


def test_groups_of_a_lost_lineage_never_arrive_and_leavers_hand_over_their_groups(pool_of, tmp_path):
    pool = pool_of(2)
    pool.wait_for(2)
    (tmp_path / "hold").touch()
    pool.submit(requests(0, 20))
    pool.discard()
    pool.publish(publication(2))
    pool.submit(requests(0, 20))  # the same groups, on other weights
    pool.resize(1, at_once=True)
    assert (pool.size, pool.outstanding) == (1, 20)
    (tmp_path / "hold").unlink()
    groups = collect(pool, 20)
    assert sorted(group[0].group_uid for group in groups) == sorted(f"g{i}" for i in range(20))
    assert {trajectory.policy_version_min for group in groups for trajectory in group} == {2}
    assert pool.outstanding == pool.restarts == 0


class Sending:
    """A learner of which there is nothing but rank 0's end of the collective."""

    def __init__(self):
        self.publisher = Publisher(CollectiveTransport(), 2**20, frozen={"embed"})

    def publish(self, version):
        weights = [("embed", torch.ones(300)), ("w", torch.full((3000,), float(version)))]
        return self.publisher.publish(weights[version > 2 :], version)


@pytest.mark.slow  # tests/unit/test_collective.py has its faults without Ray
def test_weights_by_the_collective_reach_who_joins_replaces_or_stood_still_and_outlive_no_learner(pool_of):
    pool = pool_of(2)
    pool.wait_for(2)
    sender = ray.remote(Sending).options(num_cpus=0).remote()
    kept = [ray.get(sender.publish.remote(2))]
    pool.publish(kept[0])
    pool.resize(3)
    kill(pool, "worker-0")
    gone(pool, "worker-0")
    pool.wait_for(3)
    pool.submit(requests(0, 24))
    groups = collect(pool, 24)
    assert {group[0].policy_version_min for group in groups} == {2}
    assert {group[0].worker for group in groups} == {"worker-1", "worker-2", "worker-3"}
    assert pool.restarts == 1

    stopped = pool.process_ids()["worker-1"]
    os.kill(stopped, signal.SIGSTOP)
    pool.publish(ray.get(sender.publish.remote(3)))
    pool.submit(requests(24, 12))
    groups = collect(pool, 8)
    assert {group[0].worker for group in groups} == {"worker-2", "worker-3"}, "they wait for nobody"
    os.kill(stopped, signal.SIGCONT)
    groups += collect(pool, 4)
    assert {group[0].policy_version_min for group in groups} == {3}

    lost = ray.get(sender.publish.remote(4))
    ray.kill(sender)
    pool.publish(lost)  # nobody can get it any more
    again = ray.remote(Sending).options(num_cpus=0).remote()
    pool.publish(ray.get(again.publish.remote(2)).of_version(5))
    pool.submit(requests(36, 12))
    assert {group[0].policy_version_min for group in collect(pool, 12)} == {5}
    assert pool.restarts == 1, "a learner that dies is no fault of the workers"
