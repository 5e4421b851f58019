"""A node of a cluster is killed: the run goes on with the room that is left, and ends as the undisturbed one does."""

import contextlib
import json
import secrets
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from test_command import command_line, wait_for
from test_job import free_ports
from test_supervisor import assert_ended_as, begun

pytestmark = [pytest.mark.integration, pytest.mark.slow]  # each node is a Ray of its own
RAY = Path(sys.executable).parent / "ray"
NODE_S, WAITS_S = 180, 240
APART = (  # a worker on the head, and two beside the rank on the second node
    "rollout.workers=3", "rollout.resources.custom={work: 1}", "learner.resources.custom={learn: 1}",
    "rollout.max_restarts=2",  # a node's workers count once, and once a start on it before Ray knows that it is gone
)  # fmt: skip


class Nodes:
    """Nodes of Ray, each with a loopback address of its own."""

    def __init__(self, environment, folder):
        (self.port,) = free_ports(1)
        self.environment, self.folder = environment, folder
        self.started = []

    def start(self, **resources):
        """Starts a node, the head if it is the first, and waits until Ray has it."""
        number = len(self.started) + 1
        where = ["--head", f"--port={self.port}", f"--temp-dir={self.folder}", "--include-dashboard=false"]
        where = where if number == 1 else [f"--address=127.0.0.1:{self.port}"]
        agent, exported, environments = free_ports(3)
        log = self.folder.with_suffix(f".{number}.log")
        process = subprocess.Popen(
            [RAY, "start", *where, "--block", f"--node-ip-address=127.0.0.{number}", "--num-cpus=2",
             f"--object-store-memory={128 * 2**20}", f"--resources={json.dumps(resources)}", "--min-worker-port=0",
             "--max-worker-port=0", f"--dashboard-agent-listen-port={agent}", f"--metrics-export-port={exported}",
             f"--runtime-env-agent-port={environments}"],
            env=self.environment, stdout=log.open("wb"), stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        self.started.append(process)
        wait_for(lambda: b"--block" in log.read_bytes(), f"node {number}", process, log, NODE_S)
        return process

    def end(self):
        for process in self.started:
            kill(process)


def kill(node):
    """Kills all processes of a node in one go."""
    with contextlib.suppress(psutil.NoSuchProcess):
        top = psutil.Process(node.pid)
        family = [top, *top.children(recursive=True)]
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        node.wait()
        psutil.wait_procs(family, 60)


def actors(node, name):
    return [p.pid for p in psutil.Process(node.pid).children(recursive=True) if name in command_line(p)]


@pytest.fixture
def nodes(environment):
    own = environment | {
        "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0",
    }  # fmt: skip
    found = Nodes(own, Path(environment["HOME"], "r"))
    try:
        yield found
    finally:
        found.end()
        shutil.rmtree(found.folder, ignore_errors=True)


def test_a_killed_node_with_the_rank_and_two_workers_costs_a_recovery_and_changes_nothing(whole, nodes, tmp_path):
    head, lost = nodes.start(work=1), nodes.start(work=2, learn=1)
    joined = nodes.environment | {"RAY_ADDRESS": f"127.0.0.1:{nodes.port}"}
    process, folder, log = begun(joined, tmp_path, *APART)
    try:
        (kept,), (_,) = actors(head, "WorkerActor"), actors(lost, "LearnerRank")
        assert len(actors(lost, "WorkerActor")) == 2
        kill(lost)
        wait_for(lambda: "waiting for room in the cluster" in log.read_text(), "the wait for a node", process, log)
        nodes.start(work=2, learn=1)
        assert_ended_as(whole, process, folder, log, "learner rank 0 died while it had to train: its node is gone")
    finally:
        process.kill()
    said = log.read_text()
    assert "weights travel by object_store" in said
    assert f"process {kept}" not in said, "the other worker was not lost"
