"""A recorded run again: `replay` gives its loss and gradient norm, and each service runs without the other."""

import json

import numpy as np
import pyarrow as pa
import pytest
from training import tiny
from typer.testing import CliRunner

from latent_grpo.common.metrics import read_metrics
from latent_grpo.common.schema import TrajectoryBatch
from latent_grpo.common.store import LearnerStore, TrajectoryStore
from latent_grpo.deploy.cli.app import app
from latent_grpo.deploy.replay.recorded import RecordedRun
from latent_grpo.deploy.replay.replay import replay
from latent_grpo.deploy.run.manifest import read_manifest
from latent_grpo.deploy.single_service import rollout_only, train_only
from latent_grpo.deploy.train import train

pytestmark = pytest.mark.integration
QUIET = ("evaluation.at_start=false", "evaluation.at_end=false", "self_test_groups=0")


@pytest.fixture(scope="module")
def run(ray_session, tmp_path_factory):
    """Three steps, dumped; checkpoints after steps 2 and 3 are left, those before are gone."""
    return train(tiny(f"runs_folder={tmp_path_factory.mktemp('runs')}", *QUIET), "recorded")


def test_a_step_is_reproduced_to_the_last_bit_from_the_checkpoint_before_it(run):
    result = replay(run.path, 3, [])
    assert (result.start.step, result.before) == (2, ())
    assert result.reproduced
    recorded = list(read_metrics(run.path))[2]["metrics"]
    figures = {figure.name: figure for figure in result.asked.figures}
    assert figures["loss"].replayed == figures["loss"].recorded == recorded["learner/loss"]
    assert figures["gradient norm"].replayed == recorded["learner/grad_norm"] > 0
    assert "gradient norm of update 2" in figures
    assert not result.asked.deviations


def test_without_that_checkpoint_the_steps_before_are_taken_again_and_a_deviation_is_located(run):
    store = LearnerStore(run.learner_records)
    (file,) = store.files(1)
    original = file.path.read_bytes()
    batch = store.read(1)
    values = np.array(batch.column("old_log_probs").flatten())
    values[5] += 0.5  # as a learner that computes something else would have recorded it
    column = batch.column("old_log_probs")
    changed = pa.ListArray.from_arrays(column.offsets, pa.array(values), type=column.type)
    columns = [changed if name == "old_log_probs" else batch.column(name) for name in batch.schema.names]
    file.path.unlink()
    store.write(1, pa.RecordBatch.from_arrays(columns, schema=batch.schema))
    try:
        outcome = CliRunner().invoke(app, ["replay", str(run.path), "--step", "2", "--json"])
        assert outcome.exit_code == 1
        found = json.loads(outcome.stdout)
        assert (found["from_step"], found["reproduced"]) == (0, False)
        first, asked = found["steps"]
        assert asked["reproduced"]
        (deviation,) = first["deviations"]
        row = int(np.searchsorted(np.array(column.offsets), 5, side="right")) - 1
        assert deviation["group_uid"] == batch.column("group_uid")[row].as_py()
        assert (deviation["column"], deviation["steps"]) == ("old_log_probs", 1)
        assert deviation["response_step"] == 5 - column.offsets[row].as_py()
    finally:
        file.path.write_bytes(original)


def test_the_learner_alone_repeats_the_run_from_its_dumps(run):
    alone = train_only(run.path, [])
    first, second = (
        [[row["metrics"][name] for name in ("learner/loss", "learner/grad_norm")] for row in read_metrics(folder.path)]
        for folder in (run, alone)
    )
    assert first == second
    assert TrajectoryStore(alone.trajectories).steps() == LearnerStore(alone.learner_records).steps() == [1, 2, 3]
    assert read_manifest(alone.path).data[0].source == str(run.path)
    assert RecordedRun(alone, alone.config()).base == str(run.base_model), "it can be inspected and replayed itself"


def test_the_workers_alone_generate_what_the_run_generated_first(run):
    config = tiny(f"runs_folder={run.path.parent}", "steps=2", *QUIET)
    alone = rollout_only(config, "tiny")
    ours, theirs = (TrajectoryStore(folder.trajectories).read(1) for folder in (alone, run))
    same = ("group_uid", "sample_index", "hard_ids", "reward")
    assert ours.select(same).to_pylist() == theirs.select(same).to_pylist()
    assert set(TrajectoryBatch(TrajectoryStore(alone.trajectories).read(2)).numbers("policy_version_min")) == {1}
    assert LearnerStore(alone.learner_records).steps() == []
    assert not [name for name in next(read_metrics(alone.path))["metrics"] if name.startswith("learner/")]
