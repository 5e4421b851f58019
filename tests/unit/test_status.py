"""`status` and `runs` say from the files alone what a run does, how far it is, at what pace, and what is wrong."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

import pytest
from fake_run import fake_run
from typer.testing import CliRunner

from latent_grpo.common.metrics import MetricsWriter
from latent_grpo.deploy.cli.app import app
from latent_grpo.deploy.run.folder import run_lock
from latent_grpo.deploy.run.storage.twin import Twin, write_twin
from latent_grpo.deploy.view.run_view import open_run
from latent_grpo.deploy.view.selection import InspectionError
from latent_grpo.deploy.view.status import all_statuses, newest_run, status_of


def timed(folder, seconds=10.0, start=1000.0):
    """Lets a run's steps have taken so many seconds each."""
    path = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for number, row in enumerate(rows):
        row["time"] = start + seconds * number
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows[-1]["time"]


@pytest.fixture
def run(tmp_path):
    """A run of which 2 of 6 steps are recorded, ten seconds apart."""
    fake_run(tmp_path / "a", steps=2, finished=False)
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    (tmp_path / "a" / "config.json").write_text(json.dumps(config | {"steps": 6}))
    return tmp_path / "a"


def test_a_run_whose_folder_is_locked_runs_and_has_time_left(run):
    last = timed(run)
    with run_lock(run):
        found = status_of(open_run(run), now=last + 4.0)
    assert (found.state, found.phase, found.step, found.steps) == ("running", "RL", 2, 6)
    assert found.seconds_per_step == pytest.approx(10.0)
    assert found.left_s == pytest.approx(4 * 10.0 - 4.0)
    assert found.last_step_s == pytest.approx(4.0)
    assert found.notes == ()


def test_a_run_that_nobody_works_on_has_stopped_or_finished(run, tmp_path):
    found = status_of(open_run(run))
    assert (found.state, found.left_s) == ("stopped", None)
    fake_run(tmp_path / "b", steps=3)
    assert status_of(open_run(tmp_path / "b")).state == "finished"


def test_a_step_that_takes_much_longer_than_the_others_is_said(run):
    last = timed(run)
    with run_lock(run):
        found = status_of(open_run(run), now=last + 500.0)
    assert "no step for 8.3 min, while one took 10" in found.notes[0]


def test_a_copy_in_an_object_store_that_is_behind_is_said(run):
    last, url = timed(run), "s3://bucket/runs/a"

    def notes(written_at, after=4.0):
        write_twin(run, Twin(url, ("snapshot",), written_at=written_at))
        return status_of(open_run(run), now=last + after).notes

    assert notes(last + 1) == ()
    assert notes(last - 60) == (f"its copy {url} is 64 s old and lacks the last steps: latent-grpo push {run}",)
    with run_lock(run):
        assert notes(last - 60) == (), "its upload comes every few seconds"
        assert f"its copy {url} is 10 min old: read the run's log" in notes(last - 60, after=540.0)[0]
        assert f"its copy {url} was never whole" in notes(None, after=540.0)[0]
    write_twin(run, Twin(url, (), brought=True))
    assert status_of(open_run(run), now=last + 4.0).notes == (), "the folder is behind its copy until all is here"


def test_before_rl_the_steps_are_those_of_latent_sft(tmp_path):
    fake_run(tmp_path / "a", steps=1, finished=False)
    (tmp_path / "a" / "metrics.jsonl").unlink()
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    (tmp_path / "a" / "config.json").write_text(json.dumps(config | {"warm_start": {"max_steps": 40}}))
    with MetricsWriter(tmp_path / "a") as metrics:
        metrics.write(7, {"loss": 1.0}, kind="sft")
        metrics.write(7, {"pass_at_1": 0.25}, kind="sft_evaluation")
    found = status_of(open_run(tmp_path / "a"))
    assert (found.phase, found.step, found.steps, found.pass_at_1) == ("Latent-SFT", 7, 40, 0.25)


def test_the_pace_is_that_of_the_session_that_runs(run):
    timed(run)
    with MetricsWriter(run) as metrics:
        metrics.write(3, {"rollout/reward": 0.5}, lineage=1)
    found = status_of(open_run(run))
    assert (found.step, found.seconds_per_step, found.reward) == (3, None, 0.5)


def test_runs_lists_the_newest_first_and_names_what_cannot_be_read(run, tmp_path):
    fake_run(tmp_path / "b")
    fake_run(tmp_path / "broken")
    (tmp_path / "broken" / "config.json").write_text("{")
    for name, when in (("a", 3000), ("b", 2000), ("broken", 1000)):
        for file in ("metrics.jsonl", "run.json"):
            os.utime(tmp_path / name / file, (when, when))
    found = all_statuses(tmp_path)
    assert [(one.run, one.state) for one in found] == [("a", "stopped"), ("b", "finished"), ("broken", "unreadable")]
    assert "config.json is damaged (Expecting property name" in found[2].notes[0]
    assert newest_run(tmp_path) == tmp_path / "a"
    with pytest.raises(InspectionError, match="no such folder"):
        all_statuses(tmp_path / "none")
    with pytest.raises(InspectionError, match="has no run in it"):
        all_statuses(tmp_path / "a")


@contextlib.contextmanager
def nobody():
    """Root, who may enter every folder, is the user nobody meanwhile."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_a_run_that_this_user_may_not_enter_is_listed_last_as_unreadable(run, tmp_path):
    closed = fake_run(tmp_path / "closed").path
    (tmp_path / "a-file").write_text("x")
    all_statuses(tmp_path)  # imports what the user nobody may not read
    closed.chmod(0)
    tmp_path.chmod(0o755)
    with contextlib.chdir(tmp_path), nobody():  # who may not enter the folders above it
        found = all_statuses(".")
        assert [(one.run, one.state) for one in found] == [("a", "stopped"), ("closed", "unreadable")]
        assert found[1].notes == ("closed cannot be entered: Permission denied; ask its owner for the right to",)
        assert newest_run(Path()) == Path("a")
        with pytest.raises(InspectionError, match="closed cannot be read: Permission denied; ask its owner"):
            all_statuses("closed")


def test_the_commands_print_for_people_and_for_programs(run, tmp_path):
    def printed(*arguments):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
        return result.stdout

    one = json.loads(printed("status", str(run), "--json"))
    several = json.loads(printed("runs", str(tmp_path), "--json"))
    assert several == {"runs": [one | {"last_step_s": several["runs"][0]["last_step_s"]}]}
    assert "RL 2/6" in printed("status", str(run))
    assert "RL 2/6" in printed("runs", str(tmp_path))


@pytest.mark.parametrize(
    ("file", "content", "note", "state"),
    [
        ("run.json", {"lineage": "x"}, "run.json is damaged (lineage: input should be a valid integer", "unreadable"),
        ("config.json", {"steps": "many"}, "config.json is damaged (steps: input should be a valid int", "unreadable"),
        (
            "metrics.jsonl",
            {"step": 1, "kind": "train", "lineage": 0, "metrics": {}, "time": "never"},
            "metrics.jsonl, line 1: not a line of metrics: time: expected seconds since 1970, got 'never'",
            "stopped",
        ),
    ],
)
def test_whatever_one_runs_files_hold_the_others_are_listed(run, tmp_path, file, content, note, state):
    other = fake_run(tmp_path / "other", steps=1).path
    (other / file).write_text(json.dumps(content) + "\n")
    states = {status.run: status for status in all_statuses(tmp_path)}
    assert states["other"].state == state
    assert note in states["other"].notes[0]
    assert states[run.name].state != "unreadable"


def test_a_run_that_may_not_be_read_is_said_so(tmp_path):
    other = fake_run(tmp_path / "other", steps=1).path
    (other / "config.json").unlink()
    (other / "config.json").symlink_to("/proc/self/mem")  # a file whose first byte nobody may read, not even root
    with pytest.raises(InspectionError, match=r"config.json cannot be read: Input/output error; bring it back"):
        open_run(other)
