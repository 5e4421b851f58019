"""What keeps a run from starting on this machine is one line that names the variable, and nothing is left behind."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from latent_grpo.common.config import ConfigError, load_config
from latent_grpo.common.errors import MetricsError
from latent_grpo.common.files import is_full, save_whole, unwritable, write_atomically
from latent_grpo.deploy.checks import doctor
from latent_grpo.deploy.run.folder import create_run, discard, run_lock
from latent_grpo.deploy.run.machine import head_answers, ray_faults
from latent_grpo.deploy.run.ray_session import alarm, start_errors
from latent_grpo.deploy.run.session import nothing_left
from latent_grpo.learner.checkpoint import CheckpointError, write_checkpoint

BASE = {"model": {"path": "x"}, "tasks": [{"name": "t", "path": "t.jsonl"}]}
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def no_head(address, limit_s):
    return False


def a_head(address, limit_s):
    return True


@pytest.fixture
def places(tmp_path):
    """Folders by name; root may write into any folder, so what cannot be written is a file in a folder's place."""
    (tmp_path / "file").write_text("x")
    (tmp_path / "home").mkdir()
    (tmp_path / "token").write_text("a" * 64)
    deep = tmp_path / ("x" * 90)
    deep.mkdir()
    return {"file": tmp_path / "file", "home": tmp_path / "home", "token": tmp_path / "token", "deep": deep}


@pytest.mark.parametrize(
    ("environment", "variable", "message"),
    [
        ({"RAY_ADDRESS": "http://127.0.0.1:8265"}, "RAY_ADDRESS", "address of a job server.*unset RAY_ADDRESS.*submit"),
        ({"RAY_ADDRESS": "https://head/ray"}, "RAY_ADDRESS", "address of a job server"),
        ({"RAY_ADDRESS": "head"}, "RAY_ADDRESS", "RAY_ADDRESS=head is no address.*HOST:PORT"),
        ({"RAY_ADDRESS": "head:port"}, "RAY_ADDRESS", "is none: ports are"),
        ({"RAY_ADDRESS": "10.0.0.1:6379"}, "RAY_ADDRESS", "no Ray head answers at RAY_ADDRESS=10.0.0.1:6379.*unset it"),
        ({"RAY_ADDRESS": "auto"}, "RAY_ADDRESS", "no Ray head answers at RAY_ADDRESS=auto"),
        ({"RAY_ADDRESS": "ray://head:10001"}, "RAY_ADDRESS", "no Ray head answers"),
        ({"TMPDIR": "{deep}"}, "TMPDIR", r"the path of TMPDIR=.* has \d+ bytes, and Ray's sockets in it allow \d+"),
        ({"TMPDIR": "/does/not/exist"}, "TMPDIR", "no folder that this user can write; make it, or set TMPDIR"),
        ({"TMPDIR": "{file}"}, "TMPDIR", "no folder that this user can write"),
        ({"HOME": "{file}"}, "HOME", r"cannot be written \(HOME=.*set HOME .* or RAY_AUTH_TOKEN_PATH"),
        ({"HOME": "{file}/below"}, "HOME", "its token cannot be written"),
        ({"RAY_AUTH_TOKEN_PATH": "{home}/none"}, "RAY_AUTH_TOKEN_PATH", "is no file that can be read"),
    ],
)
def test_each_fault_of_the_environment_names_its_variable_and_what_to_set(environment, variable, message, places):
    given = {"HOME": str(places["home"])} | {key: value.format(**places) for key, value in environment.items()}
    (fault,) = ray_faults(given, 1.0, no_head)
    assert fault.variable == variable
    with pytest.raises(ConfigError, match=f"^Ray cannot start: .*{message}"):
        raise ConfigError(str(fault))
    (check,) = doctor.ray_environment(given, no_head)
    assert (check.status, check.found, check.fix) == ("fail", fault.found, fault.fix)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"RAY_ADDRESS": "10.0.0.1:6379"},
        {"RAY_ADDRESS": "[::1]:6379"},
        {"RAY_ADDRESS": "auto"},
        {"RAY_ADDRESS": "local"},
        {"RAY_ADDRESS": "head.example:6379", "TMPDIR": "/does/not/exist"},  # Ray's folders are on its own nodes
        {"HOME": "{file}", "RAY_AUTH_TOKEN": "a" * 64},
        {"HOME": "{file}", "RAY_AUTH_TOKEN_PATH": "{token}"},
        {"HOME": "{file}", "RAY_AUTH_MODE": "disabled"},
        {"HOME": "{home}/not-yet-made"},
    ],
)
def test_what_ray_can_start_with_is_no_fault(environment, places):
    given = {"HOME": str(places["home"])} | {key: value.format(**places) for key, value in environment.items()}
    assert ray_faults(given, 1.0, a_head) == []
    assert doctor.ray_environment(given, a_head)[0].status == "ok"


def test_an_address_where_nothing_speaks_grpc_is_no_head():
    with socket.create_server(("127.0.0.1", 0)) as server:  # it accepts, and says nothing
        assert not head_answers(f"127.0.0.1:{server.getsockname()[1]}", 0.5)
    assert not head_answers("127.0.0.1:9", 0.2)


def test_auto_is_reached_where_ray_would_look_for_it():
    """Ray takes any head that it finds, also one that only its own run can reach, and tries it for minutes."""
    server = grpc.server(ThreadPoolExecutor(1))
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    assert head_answers("auto", 10, lambda: address)
    server.stop(None).wait()
    assert not head_answers("auto", 0.5, lambda: address)
    assert not head_answers("auto", 10, lambda: None)


@pytest.mark.parametrize(
    "error", [OSError("AF_UNIX\nmore"), ValueError("x"), ConnectionError(""), RuntimeError("a\nb")]
)
def test_whatever_ray_raises_at_its_start_is_one_line(error):
    with (
        pytest.raises(ConfigError, match=r"^Ray cannot start \(TMPDIR=/x\): .*doctor") as found,
        start_errors("TMPDIR=/x"),
    ):
        raise error
    assert "\n" not in str(found.value)


def test_the_attempt_to_reach_a_head_ends_at_its_limit():
    with pytest.raises(ConfigError, match=r"no connection within 0\.1 s"), start_errors("RAY_ADDRESS=x"), alarm(0.1):
        threading.Event().wait(60)
    with alarm(60):
        pass
    assert not any(thread.name == "alarm" for thread in threading.enumerate())


def fails(folder, lineage, error, *, begins, steps):
    with nothing_left(folder, lineage) as begin, run_lock(folder.path):
        if begins:
            begin()
        (folder.path / "metrics.jsonl").write_text("{}\n" * steps)
        (folder.path / "summary.json").write_text("{}")
        raise error


@pytest.mark.parametrize("error", [ConfigError("x"), MetricsError("x"), FULL])
@pytest.mark.parametrize("named", [False, True])
def test_a_run_that_cannot_begin_leaves_no_folder_and_one_that_has_begun_keeps_it(error, named, tmp_path):
    config = load_config({**BASE, "runs_folder": str(tmp_path / "runs")})
    refused = isinstance(error, ConfigError)  # by a worker or a rank that was given damaged weights, for example
    cases = ((0, False, 0, False), (1, False, 0, True), (0, True, 0, not refused), (0, True, 1, True))
    for lineage, begins, steps, stays in cases:
        folder = create_run(config, "x", tmp_path / "runs" / f"own{lineage}{begins}{steps}" if named else None)
        with pytest.raises(type(error)):
            fails(folder, lineage, error, begins=begins, steps=steps)
        assert folder.path.exists() is stays
    kept = create_run(config, "kept")
    (kept.path / "notes.txt").write_text("mine")
    discard(kept)
    assert [path.name for path in kept.path.iterdir()] == ["notes.txt"]


def test_an_error_of_a_run_whose_folder_is_gone_stays_that_error(tmp_path):
    folder = create_run(load_config({**BASE, "runs_folder": str(tmp_path)}), "gone")

    def lost() -> None:
        with nothing_left(folder, 0) as begin:
            begin()
            shutil.rmtree(folder.path)
            raise ConfigError("damaged weights")

    with pytest.raises(ConfigError, match=r"^damaged weights$"):
        lost()


# --- disks


@pytest.mark.parametrize("place", ["runs_folder", "run_name"])
def test_a_runs_folder_that_cannot_be_written_is_one_line(place, places):
    config = load_config({**BASE, "runs_folder": str(places["file"])})
    with pytest.raises(
        ConfigError, match=r"file.* cannot be written: .*; (set it to|choose) a folder that is writable"
    ):
        create_run(config, "x", places["file"] / "own" if place == "run_name" else None)


def test_a_full_disk_leaves_no_run_behind(tmp_path, before_fsync):
    config = load_config({**BASE, "runs_folder": str(tmp_path / "runs")})

    def full():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before_fsync(full)
    with pytest.raises(
        ConfigError, match=r"cannot be written: No space left on device \([\d,.]+ MB free\).*runs_folder"
    ):
        create_run(config, "x")
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_run_that_is_read_only_is_one_line(tmp_path):
    (tmp_path / ".lock").mkdir()  # what opening it as a file answers on any machine and for any user
    with (
        pytest.raises(ConfigError, match=r"cannot be written: .*copy it to a folder that is writable"),
        run_lock(tmp_path),
    ):
        pass


def test_an_error_of_writing_names_the_file_and_the_room(tmp_path, before_fsync):
    def full():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before_fsync(full)
    with pytest.raises(OSError, match="No space") as found:
        write_atomically(tmp_path / "a.json", "x")
    assert found.value.filename == str(tmp_path / "a.json")
    assert "MB free" in unwritable(found.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error",
    [FULL, OSError(errno.EDQUOT, "Disk quota exceeded"), RuntimeError("I/O error: No space left on device (os 28)")],
)
def test_a_library_says_a_full_disk_in_its_own_words(error, tmp_path):
    def write(folder):
        folder.mkdir()
        (folder / "part").write_text("x")
        raise error

    assert is_full(tmp_path, error)
    quota = isinstance(error, OSError) and error.errno == errno.EDQUOT
    with pytest.raises(OSError, match="Disk quota exceeded" if quota else "No space left on device") as found:
        save_whole(tmp_path / "model", write)
    assert (found.value.filename, list(tmp_path.iterdir())) == (str(tmp_path / "model"), [])
    write_checkpoint(tmp_path / "c", 1, lambda folder: None, {}, keep=1)
    with pytest.raises(CheckpointError, match=r"step 2 .*is full .*the last complete one is .*00000-step-000001"):
        write_checkpoint(tmp_path / "c", 2, write_into(error), {}, keep=1)


def write_into(error):
    def fill(folder):
        raise error

    return fill


def test_another_error_of_a_library_stays_what_it_is(tmp_path):
    with pytest.raises(KeyError):
        save_whole(tmp_path / "model", write_into(KeyError("x")))
    assert not is_full(tmp_path, KeyError("x"))


# --- terminals

SHOW = """
import sys
from latent_grpo.deploy.cli import app
sys.argv = ["latent-grpo", *sys.argv[1:]]
app.main()
"""


@pytest.mark.parametrize(
    ("environment", "target"),
    [
        ({"PYTHONIOENCODING": "ascii"}, "pipe"),
        ({"PYTHONIOENCODING": "latin-1", "COLUMNS": "60"}, "pipe"),
        ({}, "/dev/full"),
    ],
)
def test_output_that_cannot_be_shown_is_replaced_and_one_that_cannot_be_written_is_one_line(environment, target):
    command = [sys.executable, "-c", SHOW, "settings", "optimizer.lr"]
    if target == "pipe":
        found = subprocess.run(command, env=os.environ | environment, capture_output=True, check=False)
        assert (found.returncode, found.stderr) == (0, b"")
        assert b"?" in found.stdout or found.stdout.isascii()
        return
    with Path(target).open("wb") as full:
        found = subprocess.run(command, env=os.environ | environment, stdout=full, stderr=subprocess.PIPE, check=False)
    assert (found.returncode, found.stderr.count(b"\n")) == (1, 1)
    assert b"error the output, or a file, cannot be written: No space left on device" in found.stderr


@pytest.mark.parametrize(
    ("encoding", "status"), [("utf-8", "ok"), ("UTF8", "ok"), ("ascii", "warn"), ("cp1252", "warn")]
)
def test_doctor_names_an_output_without_utf8(encoding, status):
    (check,) = doctor.terminal(encoding)
    assert (check.status, check.found) == (status, encoding)
