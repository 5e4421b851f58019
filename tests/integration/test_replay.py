"""A recorded run again: `replay` gives its loss and gradient norm, and each service runs without the other."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pytest
from training import COMMON, tiny
from typer.testing import CliRunner

from latent_grpo.common.metrics import read_metrics
from latent_grpo.common.schema import TrajectoryBatch
from latent_grpo.common.store import LearnerStore, TrajectoryStore
from latent_grpo.deploy.cli.app import app
from latent_grpo.deploy.replay.recorded import RecordedRun
from latent_grpo.deploy.replay.replay import replay
from latent_grpo.deploy.run.manifest import read_manifest
from latent_grpo.deploy.single_service import rollout_only, train_only

pytestmark = pytest.mark.integration


@pytest.fixture
def run(whole):
    return whole


def test_a_step_is_reproduced_to_the_last_bit_from_the_checkpoint_before_it(run):
    result = replay(run.path, 6, [])
    assert (result.start.step, result.before) == (5, ())
    assert result.reproduced
    recorded = list(read_metrics(run.path))[5]["metrics"]
    figures = {figure.name: figure for figure in result.asked.figures}
    assert figures["loss"].replayed == figures["loss"].recorded == recorded["learner/loss"]
    assert figures["gradient norm"].replayed == recorded["learner/grad_norm"] > 0
    assert "gradient norm of update 2" in figures
    assert not result.asked.deviations


def test_without_that_checkpoint_the_steps_before_are_taken_again_and_a_deviation_is_located(run, tmp_path):
    shutil.copytree(run.path, tmp_path / "run")  # others look at the run too
    store = LearnerStore(tmp_path / "run" / run.learner_records.name)
    (file,) = store.files(1)
    batch = store.read(1)
    values = np.array(batch.column("old_log_probs").flatten())
    values[5] += 0.5  # as a learner that computes something else would have recorded it
    column = batch.column("old_log_probs")
    changed = pa.ListArray.from_arrays(column.offsets, pa.array(values), type=column.type, mask=column.is_null())
    columns = [changed if name == "old_log_probs" else batch.column(name) for name in batch.schema.names]
    file.path.unlink()
    store.write(1, pa.RecordBatch.from_arrays(columns, schema=batch.schema))
    outcome = CliRunner().invoke(app, ["replay", str(tmp_path / "run"), "--step", "2", "--json"])
    assert outcome.exit_code == 1, outcome.output
    found = json.loads(outcome.stdout)
    assert (found["from_step"], found["reproduced"]) == (0, False)
    first, asked = found["steps"]
    assert asked["reproduced"]
    (deviation,) = first["deviations"]
    row = int(np.searchsorted(np.array(column.offsets), 5, side="right")) - 1
    assert deviation["group_uid"] == batch.column("group_uid")[row].as_py()
    assert (deviation["column"], deviation["steps"]) == ("old_log_probs", 1)
    assert deviation["response_step"] == 5 - column.offsets[row].as_py()


def test_the_learner_alone_repeats_the_run_from_its_dumps(run):
    alone = train_only(run.path, [])
    first, second = (
        [[row["metrics"][name] for name in ("learner/loss", "learner/grad_norm")] for row in read_metrics(folder.path)]
        for folder in (run, alone)
    )
    assert first == second
    assert (
        TrajectoryStore(alone.trajectories).steps() == LearnerStore(alone.learner_records).steps() == [1, 2, 3, 4, 5, 6]
    )
    assert read_manifest(alone.path).data[0].source == str(run.path)
    assert RecordedRun(alone, alone.config()).base == str(run.base_model), "it can be inspected and replayed itself"


def test_the_workers_alone_generate_what_the_run_generated_first(run):
    config = tiny(*COMMON, f"runs_folder={run.path.parent}", "steps=2")
    alone = rollout_only(config, "tiny")
    ours, theirs = (TrajectoryStore(folder.trajectories).read(1) for folder in (alone, run))
    same = ("group_uid", "sample_index", "hard_ids", "reward")
    assert ours.select(same).to_pylist() == theirs.select(same).to_pylist()
    assert set(TrajectoryBatch(TrajectoryStore(alone.trajectories).read(2)).numbers("policy_version_min")) == {1}
    assert LearnerStore(alone.learner_records).steps() == []
    assert not [name for name in next(read_metrics(alone.path))["metrics"] if name.startswith("learner/")]
