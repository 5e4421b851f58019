"""What a run's summary says is of the model that the run left, and its minutes are those of all its sessions."""

from __future__ import annotations

import contextlib
import io

import pytest
from fake_run import fake_config
from rich.console import Console

from latent_grpo.deploy.run.folder import create_run
from latent_grpo.deploy.run.progress import Reporter
from latent_grpo.deploy.run.session import Run
from latent_grpo.deploy.train import final_table, timed, unmeasured


def a_run(path, **summary):
    folder = create_run(fake_config(), "x", path)
    return Run(folder, folder.config(), 1, Reporter(), None, None, None, summary=dict(summary))


def session(run, error=None):
    with contextlib.suppress(type(error) if error else ()), timed(run):
        if error:
            raise error


def test_minutes_are_those_of_every_session_and_only_a_run_that_ended_has_them(tmp_path):
    run = a_run(tmp_path / "a", sessions=[3.0])
    session(run, KeyboardInterrupt())
    stored = run.folder.read_json("summary.json")
    assert "minutes" not in stored
    assert stored["sessions"] == [3.0, pytest.approx(0, abs=1)]
    session(run)
    stored = run.folder.read_json("summary.json")
    assert len(stored["sessions"]) == 3
    assert stored["minutes"] == pytest.approx(sum(stored["sessions"]), abs=0.011)


def test_a_run_that_had_ended_and_goes_on_keeps_its_minutes_as_a_session(tmp_path):
    run = a_run(tmp_path / "a", minutes=5.0, after={"x/pass_at_1": 0.5})  # by a version that knew no sessions
    session(run, ValueError())
    stored = run.folder.read_json("summary.json")
    assert stored["sessions"][0] == 5.0
    assert "minutes" not in stored, "it is unfinished again"


def test_an_entry_is_taken_out_of_the_file(tmp_path):
    run = a_run(tmp_path / "a", before={"x/pass_at_1": 0.25}, after={"x/pass_at_1": 0.5})
    run.record(after=None)
    assert run.folder.read_json("summary.json") == {"before": {"x/pass_at_1": 0.25}}


def test_a_run_without_evaluations_says_how_to_measure_its_model(tmp_path):
    run = a_run(tmp_path / "a", minutes=1.5)
    assert f"evaluate --model {run.folder.model}" in unmeasured(run)
    measured = a_run(tmp_path / "b", minutes=8.0, before={})
    console = Console(file=io.StringIO(), width=200, record=True)
    console.print(final_table(measured))
    assert "8 minutes" in console.export_text()
