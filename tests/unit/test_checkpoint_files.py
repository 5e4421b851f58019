"""Checkpoints on disk: a kill at any byte costs at most the checkpoint that was being written."""

import errno
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import xxhash

from latent_grpo.learner.checkpoint import (
    MANIFEST,
    CheckpointError,
    checkpoint_files,
    latest_checkpoint,
    list_checkpoints,
    verify_checkpoint,
    write_checkpoint,
)


def fill(content=b"weights" * 100):
    def write(folder):
        (folder / "zero").mkdir()
        (folder / "zero" / "rank0.pt").write_bytes(content)
        (folder / "empty").write_bytes(b"")

    return write


def three(root, keep=3):
    return [write_checkpoint(root, step, fill(b"%d" % step * 50), {"step": step}, keep) for step in (10, 20, 30)]


def test_the_last_checkpoint_is_taken_with_its_state(tmp_path):
    three(tmp_path)
    latest = latest_checkpoint(tmp_path)
    assert (latest.step, latest.state, latest.skipped) == (30, {"step": 30}, ())
    assert (latest.path / "zero" / "rank0.pt").read_bytes() == b"30" * 50


def test_no_checkpoint_is_none(tmp_path):
    assert latest_checkpoint(tmp_path) is None
    assert latest_checkpoint(tmp_path / "absent") is None


def test_only_the_newest_are_kept(tmp_path):
    three(tmp_path, keep=2)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [20, 30]
    assert len(list(tmp_path.iterdir())) == 2


def test_a_rewound_run_resumes_from_what_it_wrote_last(tmp_path):
    three(tmp_path)
    write_checkpoint(tmp_path, 20, fill(), {"lineage": 1}, keep=3)
    assert latest_checkpoint(tmp_path).state == {"lineage": 1}


@pytest.mark.parametrize("name", ["zero/rank0.pt", "state.json", MANIFEST, "empty"])
def test_a_removed_file_means_the_one_before_and_is_named(tmp_path, name):
    last = three(tmp_path)[-1]
    (last.path / name).unlink()
    latest = latest_checkpoint(tmp_path)
    assert latest.step == 20
    assert [s.path for s in latest.skipped] == [last.path]
    assert f"{name} is missing" in latest.skipped[0].reason


@pytest.mark.parametrize("name", ["zero/rank0.pt", "state.json", MANIFEST])
def test_a_file_cut_at_any_byte_means_the_one_before(tmp_path, name):
    last = three(tmp_path)[-1]
    content = (last.path / name).read_bytes()
    for length in range(0, len(content), max(1, len(content) // 40)):
        (last.path / name).write_bytes(content[:length])
        assert latest_checkpoint(tmp_path).step == 20, f"{name} cut to {length} bytes was accepted"
    (last.path / name).write_bytes(content)
    assert latest_checkpoint(tmp_path).step == 30


@pytest.mark.parametrize("name", ["zero/rank0.pt", "state.json", MANIFEST])
def test_a_flipped_bit_means_the_one_before(tmp_path, name):
    last = three(tmp_path)[-1]
    content = bytearray((last.path / name).read_bytes())
    content[len(content) // 2] ^= 1
    (last.path / name).write_bytes(content)
    assert latest_checkpoint(tmp_path).step == 20


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_over_in_silence(tmp_path):
    for checkpoint in three(tmp_path):
        (checkpoint.path / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match="all 3 checkpoints are damaged"):
        latest_checkpoint(tmp_path)


def test_a_fill_that_fails_leaves_the_earlier_checkpoint(tmp_path):
    three(tmp_path, keep=1)

    def broken(folder):
        (folder / "half").write_bytes(b"x")
        raise RuntimeError("a rank died")

    with pytest.raises(RuntimeError, match="a rank died"):
        write_checkpoint(tmp_path, 40, broken, {}, keep=1)
    assert latest_checkpoint(tmp_path).step == 30
    assert len(list(tmp_path.iterdir())) == 1


def test_a_full_disk_is_said_as_such_and_leaves_the_earlier_checkpoint(tmp_path):
    write_checkpoint(tmp_path, 1, lambda folder: None, {"step": 1}, keep=2)

    def full(folder):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(CheckpointError, match=r"of step 2 could not be written: the disk of \S+ is full .* make room"):
        write_checkpoint(tmp_path, 2, full, {"step": 2}, keep=2)
    assert latest_checkpoint(tmp_path).step == 1
    assert len(list(tmp_path.iterdir())) == 1


def test_state_that_json_cannot_hold_is_refused(tmp_path):
    with pytest.raises(ValueError, match="JSON compliant"):
        write_checkpoint(tmp_path, 1, fill(), {"loss": float("nan")}, keep=1)
    assert latest_checkpoint(tmp_path) is None


_ENDLESS_WRITER = """
import sys
from pathlib import Path
from latent_grpo.learner.checkpoint import write_checkpoint
def fill(folder):
    for i in range(20):
        (folder / f"shard{i}").write_bytes(bytes([i]) * 50_000)
step = int(sys.argv[2])
while True:
    step += 1
    write_checkpoint(sys.argv[1], step, fill, {"step": step}, keep=2)
    print(step, flush=True)
"""


def test_kill_9_at_any_moment_leaves_a_checkpoint_that_is_complete(tmp_path):
    step = 0
    for attempt in range(6):
        command = [sys.executable, "-c", _ENDLESS_WRITER, str(tmp_path), str(step)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            finished = int(process.stdout.readline())
            time.sleep(0.007 * attempt)
        finally:
            os.kill(process.pid, signal.SIGKILL)
            rest = process.communicate()[0].split()
        finished = int(rest[-1]) if rest else finished
        latest = latest_checkpoint(tmp_path)
        assert latest.step in (finished, finished + 1)  # killed between the rename and the message
        assert verify_checkpoint(latest.path) == {"step": latest.step}
        step = latest.step


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname"])
def test_a_manifest_that_names_a_file_elsewhere_is_damaged(tmp_path, name):
    write_checkpoint(tmp_path, 1, fill(), {"step": 1}, 3)
    ((_, path),) = list_checkpoints(tmp_path)
    body = json.loads((path / MANIFEST).read_text())
    body["files"][name] = [1, "0"]
    del body["checksum"]
    text = json.dumps(body, sort_keys=True)
    (path / MANIFEST).write_text(json.dumps(body | {"checksum": xxhash.xxh3_128_hexdigest(text.encode())}))
    assert checkpoint_files(path) == []
    with pytest.raises(CheckpointError, match="not in the checkpoint"):
        verify_checkpoint(path)
