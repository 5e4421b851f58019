"""A process that hangs says where, on a real Ray."""

import os
import signal
import time

import pytest
import ray

from common.config import parse_config
from common.stacks import answer_with_stacks, stacks_of
from learner.actor import RankActor
from learner.group import LearnerError, RankGroup

pytestmark = pytest.mark.integration


class Hanging:
    def __init__(self):
        self._process = answer_with_stacks()

    def process(self):
        return self._process

    def waits_for_a_peer(self):
        time.sleep(600)


def test_stacks_of_a_process_that_hangs_is_stopped_and_is_gone(ray_session):
    actor = ray.remote(Hanging).options(num_cpus=0, max_concurrency=2).remote()
    process = ray.get(actor.process.remote(), timeout=60)
    actor.waits_for_a_peer.remote()
    end = time.monotonic() + 30
    while "waits_for_a_peer" not in (stacks := stacks_of(process)):
        assert time.monotonic() < end, stacks
    assert stacks.count("waits_for_a_peer") == 1, "each answer is given once"
    os.kill(process.pid, signal.SIGSTOP)
    assert "the kernel says: State: T" in stacks_of(process)
    os.kill(process.pid, signal.SIGKILL)
    time.sleep(1)
    assert stacks_of(process) == "it no longer runs"


def test_stacks_are_asked_for_on_the_process_own_node(ray_session, monkeypatch):
    actor = ray.remote(Hanging).options(num_cpus=0).remote()
    process = ray.get(actor.process.remote(), timeout=60)
    monkeypatch.setattr(ray.runtime_context.RuntimeContext, "get_node_id", lambda self: "another node")
    assert "Current thread" in stacks_of(process)
    ray.kill(actor)


class StuckRank(RankActor):
    def setup(self, *arguments):
        self.never_loads()

    def never_loads(self):
        time.sleep(600)


def test_a_learner_that_misses_its_deadline_shows_its_stacks(ray_session, caplog):
    config = parse_config(
        {
            "model": {"path": "unused"}, "tasks": [{"name": "t", "path": "builtin:arithmetic"}],
            "learner": {"resources": {"num_cpus": 0.1}}, "deadlines": {"start_s": 25},
        }
    )  # fmt: skip
    with pytest.raises(LearnerError, match=r"learner rank\(s\) \[0\] did not load the model within 25 s"):
        RankGroup(StuckRank, config, "unused")
    assert "learner rank 0, which was to load the model" in caplog.text
    assert "in never_loads" in caplog.text
