"""Two processes never write into one run's folder; a dead one holds nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from latent_grpo.common.config import load_config
from latent_grpo.deploy.run.folder import FolderInUse, create_run, reopen_run, run_lock

BASE = {"model": {"path": "x"}, "tasks": [{"name": "t", "path": "t.jsonl"}]}
HOLD = """
import sys
from pathlib import Path
from latent_grpo.deploy.run.folder import run_lock
with run_lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def held(tmp_path):
    """A run that another process is at."""
    folder = create_run(load_config({**BASE, "runs_folder": str(tmp_path)}), "tiny")
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"held\n"
    yield folder, process
    process.kill()
    process.wait(60)
    process.stdin.close()
    process.stdout.close()


def test_a_run_that_has_not_stopped_is_not_resumed_and_stays_as_it_is(held):
    folder, process = held
    before = (folder.path / "run.json").read_bytes()
    with pytest.raises(FolderInUse, match=rf"locked by process {process.pid} on .*Wait for it to end, or stop it"):
        reopen_run(folder.path, [], "train")
    assert (folder.path / "run.json").read_bytes() == before, "its lineage is not touched"


def test_a_killed_process_holds_nothing(held):
    folder, process = held
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    assert reopen_run(folder.path, [], "train")[2] == 1
    with run_lock(folder.path):
        assert f"process {os.getpid()} on" in (folder.path / ".lock").read_text()


def test_it_is_free_again_after_an_error(tmp_path):
    with pytest.raises(ValueError, match="the cause"), run_lock(tmp_path):
        raise ValueError("the cause")
    with run_lock(tmp_path):
        pass
