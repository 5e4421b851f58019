"""Checkpoints beside the steps: one at a time, whole or not there, and whatever fails is told at the next step."""

from __future__ import annotations

import errno
import io
import signal
import subprocess
import sys
import threading
import time

import pytest
from rich.console import Console

from latent_grpo.common.config import DeadlineConfig
from latent_grpo.deploy.run.background import BackgroundWork
from latent_grpo.deploy.run.progress import Reporter
from latent_grpo.deploy.run.stepping import StateKeeper
from latent_grpo.learner.checkpoint import CheckpointError, latest_checkpoint, list_checkpoints, write_checkpoint


class Disk:
    """Writes checkpoints of a few bytes, of what the state was when it was copied, as fast as `allowed` says."""

    def __init__(self, root):
        self.root, self.weights, self.allowed, self.error = root, 0, threading.Event(), None
        self.allowed.set()
        self.console, self.recorded, self.running, self.most = Console(file=io.StringIO(), record=True), [], 0, 0
        self.keeper = StateKeeper(
            "training", 0, self.copy, lambda done, values: self.recorded.append((done, values)), DeadlineConfig(),
            Reporter(self.console), BackgroundWork(),
        )  # fmt: skip

    def copy(self, done):
        copied = self.weights

        def fill(folder):
            self.running += 1
            self.most = max(self.most, self.running)
            assert self.allowed.wait(60)
            self.running -= 1
            if self.error is not None:
                raise self.error
            (folder / "weights").write_text(str(copied))

        return lambda: write_checkpoint(self.root, done, fill, {"step": done}, 2)

    def steps(self):
        return [step for step, _ in list_checkpoints(self.root)]


@pytest.fixture
def disk(tmp_path):
    made = Disk(tmp_path)
    yield made
    made.allowed.set()


def test_the_step_goes_on_and_what_is_written_is_the_state_of_before(disk):
    disk.allowed.clear()
    disk.weights = 1
    disk.keeper.keep(1)
    disk.weights = 2  # the next step
    disk.keeper.look()
    assert (disk.steps(), disk.keeper.saved, disk.recorded) == ([], 0, [])
    disk.allowed.set()
    disk.keeper.finish()
    assert (disk.steps(), disk.keeper.saved) == ([1], 1)
    (folder,) = (path for _, path in list_checkpoints(disk.root))
    assert (folder / "weights").read_text() == "1"
    ((done, values),) = disk.recorded
    assert (done, values.keys()) == (1, {"seconds", "waited_seconds"})
    assert values["waited_seconds"] <= values["seconds"]


def test_one_is_written_at_a_time_and_none_twice(disk):
    for done in (1, 1, 2, 3, 3):
        disk.keeper.keep(done)
    disk.keeper.finish()
    disk.keeper.keep(3)
    assert ([done for done, _ in disk.recorded], disk.most, disk.steps()) == ([1, 2, 3], 1, [2, 3])


def test_a_full_disk_is_told_at_the_next_step_in_the_words_of_always(disk):
    disk.keeper.keep(1)
    disk.keeper.finish()
    disk.error = OSError(errno.ENOSPC, "No space left on device")
    disk.keeper.keep(2)
    with pytest.raises(
        CheckpointError, match=r"^the checkpoint of step 2 could not be written: the disk of .* is full"
    ):
        until(disk.keeper)
    assert (disk.steps(), disk.keeper.saved) == ([1], 1)
    assert "the checkpoint of training step 1 is complete; not saved: step 2" in disk.keeper.report(2)


def until(keeper):
    """The steps' looks, until one raises."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        keeper.look()
        time.sleep(0.01)


def test_the_end_waits_and_a_failure_of_work_that_nobody_awaits_is_logged(disk, caplog):
    work, ended = BackgroundWork(), []

    def fail():
        ended.append(disk.allowed.wait(60))
        raise RuntimeError("a rank is gone")

    disk.allowed.clear()
    work.start(fail)
    threading.Timer(0.1, disk.allowed.set).start()
    work.close()
    assert ended == [True]
    assert "work in the background failed: a rank is gone" in caplog.text


KILLED = """
import os, signal, sys, threading
from latent_grpo.deploy.run.background import BackgroundWork
from latent_grpo.learner.checkpoint import write_checkpoint

root, reached = sys.argv[1], threading.Event()

def fill(folder):
    (folder / "weights").write_text("half")
    reached.set()
    threading.Event().wait(60)

write_checkpoint(root, 1, lambda folder: (folder / "weights").write_text("whole"), {"step": 1}, 2)
BackgroundWork().start(lambda: write_checkpoint(root, 2, fill, {"step": 2}, 2))
assert reached.wait(60)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_run_that_is_killed_in_the_write_goes_on_from_the_checkpoint_before(tmp_path):
    ended = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False, timeout=120)
    assert ended.returncode == -signal.SIGKILL
    found = latest_checkpoint(tmp_path)
    assert (found.step, [s.path.name for s in found.skipped]) == (1, [".unfinished-00001-step-000002"])
    assert (found.path / "weights").read_text() == "whole"
