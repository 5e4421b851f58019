"""`latent_grpo.open_run` gives what a run has recorded as Arrow tables, and of a run that goes on what is complete."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fake_run import fake_run

import latent_grpo
from latent_grpo.common.learner_record import record_schema
from latent_grpo.common.metrics import MetricsWriter
from latent_grpo.common.schema import trajectory_schema
from latent_grpo.common.store import DumpError, LearnerStore, TrajectoryStore
from latent_grpo.deploy.run.health import Alarm, LineFile
from latent_grpo.deploy.view.selection import InspectionError


@pytest.fixture
def run(tmp_path):
    fake_run(tmp_path / "a")
    return latent_grpo.open_run(tmp_path / "a")


def test_metrics_have_a_row_a_step_and_a_column_a_metric(run):
    with MetricsWriter(run.path) as metrics:
        metrics.write(3, {"chains/pass_at_1": float("nan")}, kind="evaluation")
    table = run.metrics()
    assert table["step"].to_pylist() == [1, 2, 3]
    assert table["learner/loss"].to_pylist() == [0.01] * 3
    assert "chains/pass_at_1" not in table.column_names
    assert run.metrics("evaluation")["chains/pass_at_1"].to_pylist() == [None]
    assert run.metrics(None).num_rows == 4
    assert run.metrics("sft").num_rows == 0


def test_trajectories_are_the_rows_of_the_dumps_with_their_place(run):
    table = run.trajectories()
    assert table.column_names == ["step", "lineage", "purpose", *trajectory_schema(3).names]
    assert table.num_rows == 3 * 16
    second = run.trajectories([2], columns=["group_uid", "reward"])
    assert run.trajectories(2, columns="reward").equals(run.trajectories([2], columns=["reward"]))
    stored = TrajectoryStore(run.path / "trajectories").read(2)
    assert second.column_names == ["step", "lineage", "purpose", "group_uid", "reward"]
    assert second["reward"].to_pylist() == stored["reward"].to_pylist()
    assert set(second["step"].to_pylist()) == {2}


def test_learner_records_join_their_trajectories(run):
    key = ["step", "group_uid", "sample_index"]
    joined = run.trajectories(columns=["group_uid", "sample_index", "reward"]).join(
        run.learner_records(columns=["group_uid", "sample_index", "advantage"]), key, join_type="inner"
    )
    assert joined.num_rows == 3 * 16
    records = LearnerStore(run.path / "learner_records").read(1)
    assert run.learner_records([1])["advantage"].to_pylist() == records["advantage"].to_pylist()


def test_what_does_not_exist_is_an_empty_table_of_the_same_columns(run):
    assert run.trajectories([99]).schema.names == run.trajectories([1]).schema.names
    assert run.learner_records([99]).schema.names == ["step", "lineage", "purpose", *record_schema().names]
    assert run.trajectories([99]).num_rows == run.alarms().num_rows == 0
    with pytest.raises(DumpError, match="no column rewards; columns: run_id,"):
        run.trajectories(columns=["rewards"])
    with pytest.raises(InspectionError, match="no such run folder"):
        latent_grpo.open_run(run.path / "none")


def test_a_run_that_goes_on_is_read_as_far_as_it_is_complete(run):
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "kind": "tr')  # a line that is being written
    (run.path / "trajectories" / "training" / "step=4").mkdir()
    (run.path / "trajectories" / "training" / "step=4" / ".tmp-1-lineage-0000-part-0000").write_bytes(b"PAR1")
    assert run.metrics().num_rows == 3
    assert run.trajectories([4]).num_rows == 0
    again = TrajectoryStore(run.path / "trajectories")
    again.write(4, again.read(3))
    assert run.trajectories([4]).num_rows == 16, "the same object sees what came since"


def test_alarms_are_a_table(run):
    alarm = Alarm(
        step=2, lineage=0, time=1.5, name="max_invalid_share", state="raised", value=0.5, limit=0.2,
        message="half are cut off", cause="a cause", remedy="a remedy",
    )  # fmt: skip
    LineFile(run.path / "alarms.jsonl").append(dataclasses.asdict(alarm))
    table = run.alarms()
    assert table.select(["step", "name", "value"]).to_pylist() == [{"step": 2, "name": alarm.name, "value": 0.5}]
    assert table["time"].to_pylist()[0].timestamp() == 1.5
    assert run.status().alarms == (alarm,)


def test_reading_a_run_needs_no_torch():
    code = "import sys, latent_grpo; latent_grpo.open_run; sys.exit('torch' in sys.modules or 'ray' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_run_is_found_below_the_home_folder(tmp_path):
    run = fake_run(tmp_path / "run", steps=1, groups=1)
    opened = latent_grpo.open_run(f"~/{os.path.relpath(run.path, Path.home())}")
    assert opened.metrics().num_rows == latent_grpo.open_run(run.path).metrics().num_rows > 0
