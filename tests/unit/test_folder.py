"""Two processes never write into one run's folder; a dead one holds nothing."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest

from latent_grpo.common.config import ConfigError, load_config
from latent_grpo.deploy.run.folder import (
    LEASE_S,
    FolderInUse,
    ResumeError,
    RunFolder,
    check_named,
    create_run,
    has_begun,
    in_use,
    named_run,
    open_run,
    reopen_run,
    run_lock,
)

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


OTHER = '{"host": "another-machine", "pid": 7, "machine": "x"}'


def test_the_lease_of_a_machine_that_is_gone_runs_out_and_one_that_is_renewed_is_respected(tmp_path):
    lease = tmp_path / ".lease"
    lease.write_text(OTHER)
    os.utime(lease, (time.time() - LEASE_S + 2,) * 2)
    began = time.monotonic()
    with run_lock(tmp_path):  # two seconds later
        assert json.loads(lease.read_text())["pid"] == os.getpid()
    assert time.monotonic() - began > 1
    assert not lease.exists()

    lease.write_text(OTHER)
    assert "locked by process 7 on another-machine" in in_use_of_another(tmp_path)
    renewing = threading.Timer(1.5, lease.write_text, (OTHER,))
    renewing.start()
    with (
        pytest.raises(FolderInUse, match="locked by process 7 on another-machine, which renews its lease"),
        run_lock(tmp_path),
    ):
        pass
    renewing.join()


def in_use_of_another(folder):
    (folder / ".lock").touch()
    return in_use(folder)


def test_a_named_run_that_has_begun_goes_on_and_one_that_has_not_is_made(tmp_path):
    config = load_config("quickstart", [f"runs_folder={tmp_path}", "run_name=job-7"])
    assert not has_begun(named_run(config))
    folder = create_run(config, "quickstart", named_run(config))
    assert folder.path == tmp_path / "job-7"
    assert has_begun(folder.path)
    with pytest.raises(ConfigError, match="job-7 holds a run already"):
        create_run(config, "quickstart", folder.path)
    assert create_run(config, "evaluate-x", kind="evaluate").path != folder.path  # an evaluation of it has its own
    more = load_config("quickstart", [f"runs_folder={tmp_path}", "run_name=job-7", "rollout.workers=2"])
    again, taken, lineage = reopen_run(folder.path, [], "train", more)
    assert (again, taken.rollout.workers, lineage) == (folder, 2, 1)
    other = load_config("quickstart", [f"runs_folder={tmp_path}", "run_name=job-7", "group_size=4"])
    check_named(folder.path, more, ["train", "sft"])
    with pytest.raises(ResumeError, match="group_size"):
        check_named(folder.path, other, ["train"])
    with pytest.raises(ConfigError, match=r"run_name job-7: .* is a run of `train`; give another name"):
        check_named(folder.path, more, ["sft"])
    with pytest.raises(ConfigError, match="run_name"):
        load_config("quickstart", ["run_name=../elsewhere"])


def test_relative_paths_are_those_of_the_folder_in_which_the_run_was_started(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    for place in (here / "data", here / "models" / "m", there):
        place.mkdir(parents=True)
    for name in ("x.jsonl", "y-0.jsonl"):
        (here / "data" / name).touch()
    task = {"path": "data/x.jsonl", "verifier": "number"}
    evaluated = [{**task, "name": "y", "path": "data/y-*.jsonl"}, {**task, "name": "z", "path": "data/gone.jsonl"}]
    settings = {
        "model": {"path": "models/m"},
        "tasks": [{**task, "name": "x"}, {"name": "made", "path": "builtin:chain_arithmetic"}],
        "evaluation": {"tasks": evaluated},
        "run_name": "job",
        "runs_folder": str(tmp_path / "runs"),
    }
    config = load_config(settings)
    with contextlib.chdir(here):
        folder = create_run(config, "tiny", named_run(config)).path
        same = reopen_run(folder, [], "train")[1]
    assert same.tasks[0].path == "data/x.jsonl"
    with contextlib.chdir(there):
        assert reopen_run(folder, [], "train", config)[1] == config, "a job that is started again names its own files"
        found = reopen_run(folder, [], "train")[1]
        again = reopen_run(folder, ["steps=77"], "train")[1]
        assert reopen_run(folder, [], "train", again)[1].steps == 77
    assert [task.path for task in found.tasks] == [str(here / "data" / "x.jsonl"), "builtin:chain_arithmetic"]
    assert [task.path for task in found.evaluation.tasks] == [str(here / "data" / "y-*.jsonl"), "data/gone.jsonl"]
    assert found.model.path == str(here / "models" / "m")
    assert again.tasks == found.tasks
    shutil.rmtree(here)
    with contextlib.chdir(there):
        assert RunFolder(folder).read_json("run.json")["started_in"] == str(here)
        reopen_run(folder, [], "train")
        assert RunFolder(folder).read_json("run.json")["started_in"] == str(there)


def test_a_models_folder_is_no_run_and_its_keys_are_no_settings(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama", "vocab_size": 9}')
    with pytest.raises(ResumeError, match=r"^--resume .*: it has no run\.json; give a run folder"):
        open_run(tmp_path, [], "--resume")
