"""A process that hangs says where, on a real Ray."""

import dataclasses
import os
import signal
import subprocess
import time

import pytest
import ray

from latent_grpo.common.config import parse_config
from latent_grpo.common.stacks import ProcessAddress, ask_for_stacks, serve_stacks
from latent_grpo.learner.base_rank import RankActor
from latent_grpo.learner.group import LearnerError, RankGroup

pytestmark = pytest.mark.integration


class Hanging:
    def __init__(self):
        self._process = serve_stacks()

    def process(self):
        return self._process

    def waits_for_a_peer(self):
        time.sleep(600)


@pytest.mark.slow
def test_stacks_of_a_process_that_hangs_is_stopped_and_is_gone(ray_session):
    actor = ray.remote(Hanging).options(num_cpus=0, max_concurrency=2).remote()
    process = ray.get(actor.process.remote(), timeout=300)
    actor.waits_for_a_peer.remote()
    end = time.monotonic() + 120
    while "waits_for_a_peer" not in (stacks := ask_for_stacks([process])[0]):
        assert time.monotonic() < end, stacks
    assert stacks.count("waits_for_a_peer") == 1, "each answer is given once"
    other = ray.remote(Hanging).options(num_cpus=0).remote()
    answers = ray.get(other.process.remote(), timeout=300)
    os.kill(process.pid, signal.SIGSTOP)
    stopped, running = ask_for_stacks([process, answers])
    assert "the kernel says: State: T" in stopped
    assert "waits_for_a_peer" not in running
    assert "hread" in running, "the first did not keep the second from answering"
    os.kill(process.pid, signal.SIGKILL)
    while ask_for_stacks([process]) != ["it no longer runs"]:
        assert time.monotonic() < end, "its end is not seen"
    ray.kill(other)


def test_a_process_that_was_given_a_dead_ones_pid_is_left_alone(ray_session):
    with subprocess.Popen(["sleep", "60"]) as stranger:
        here = ray.get_runtime_context().get_node_id()
        gone = ProcessAddress(here, stranger.pid, f"/proc/{stranger.pid}/fd/1", inode=1)
        assert ask_for_stacks([gone]) == ["it no longer runs"]
        assert stranger.poll() is None, "SIGUSR1 ends a process that does not know it"
        stranger.kill()


def test_other_nodes_are_asked_on_themselves_and_one_that_is_lost_hides_no_other(ray_session, monkeypatch):
    actor = ray.remote(Hanging).options(num_cpus=0).remote()
    process = ray.get(actor.process.remote(), timeout=300)
    lost = dataclasses.replace(process, node_id="ab" * 28)
    monkeypatch.setattr(ray.runtime_context.RuntimeContext, "get_node_id", lambda self: "driver's node")
    unreachable, there = ask_for_stacks([lost, process], ask_s=60.0)  # the lost one is refused at once
    assert "its node could not be asked" in unreachable
    assert "hread" in there
    ray.kill(actor)


class StuckRank(RankActor):
    def setup(self, *arguments):
        self.never_loads()

    def never_loads(self):
        time.sleep(600)


class HastyGroup(RankGroup):
    """Waits a 150th of its deadline for the model, once the process is there: that may take long on a busy machine."""

    def _wait(self, refs, seconds, doing, key, clock=None):
        seconds = seconds / 150 if doing == "load the model" else seconds
        return super()._wait(refs, seconds, doing, key, clock)  # no setting is of this wait alone


def test_a_learner_that_misses_its_deadline_shows_its_stacks(ray_session, caplog):
    config = parse_config(
        {
            "model": {"path": "unused"}, "tasks": [{"name": "t", "path": "builtin:arithmetic"}],
            "learner": {"resources": {"num_cpus": 0.1}}, "deadlines": {"start_s": 300},
        }
    )  # fmt: skip
    with pytest.raises(LearnerError, match=r"learner rank\(s\) \[0\] did not load the model within 2 s"):
        HastyGroup(StuckRank, config, "unused")
    assert "learner rank 0, which had to load the model" in caplog.text
    assert "in never_loads" in caplog.text
