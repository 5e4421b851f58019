"""What can be computed again of a run: the nearest state, the batch as the learner had it, and a sentence where not."""

import shutil

import pytest
from fake_run import fake_run

from latent_grpo.common.learner_record import LearnerBatch, join
from latent_grpo.common.schema import take_rows
from latent_grpo.common.store import LearnerStore, TrajectoryStore
from latent_grpo.deploy.replay.recorded import RecordedError, RecordedRun
from latent_grpo.learner.checkpoint import write_checkpoint


def run(path, steps=6, **options):
    folder = fake_run(path / "run", steps=steps, **options)
    return RecordedRun(folder, folder.config())


def checkpoint(recorded, step, lineage=0):
    path = recorded.folder.checkpoints
    return write_checkpoint(path, step, lambda f: (f / "x").write_text("x"), {"lineage": lineage}, keep=9).path


def remove(recorded, *steps):
    for step in steps:
        recorded.trajectories.remove(step)
        recorded.records.remove(step)


def test_the_checkpoint_before_the_step_is_the_start(tmp_path):
    recorded = run(tmp_path)
    path = checkpoint(recorded, 2)
    checkpoint(recorded, 4)
    assert recorded.start_for(1).checkpoint is None
    assert (recorded.start_for(3).step, recorded.start_for(3).checkpoint) == (2, path)
    assert recorded.start_for(6).step == 4, "step 5 is taken again on the way"


def test_an_earlier_state_serves_where_all_steps_between_are_dumped(tmp_path):
    recorded = run(tmp_path)
    assert recorded.start_for(6).step == 0
    assert recorded.replayable() == [1, 2, 3, 4, 5, 6]
    remove(recorded, 3)
    checkpoint(recorded, 4)
    assert recorded.replayable() == [1, 2, 5, 6]
    with pytest.raises(RecordedError, match="step 3 was not dumped, or its dump was removed; dumped: 1-2, 4-6"):
        recorded.start_for(3)
    with pytest.raises(RecordedError, match=r"state after step 3.*Existing checkpoints: 4 .*replayed: 1-2, 5-6"):
        recorded.start_for(4)


def test_a_damaged_checkpoint_is_no_start(tmp_path):
    recorded = run(tmp_path)
    path = checkpoint(recorded, 4)
    (path / "x").write_text("y")
    assert recorded.start_for(5).step == 0


def test_a_checkpoint_of_abandoned_steps_is_no_start(tmp_path):
    recorded = run(tmp_path)
    checkpoint(recorded, 4, lineage=3)
    assert recorded.start_for(5).step == 0


@pytest.mark.parametrize("learner", [True, False])
def test_the_batch_is_what_was_trained_on_with_and_without_learner_records(tmp_path, learner):
    recorded = run(tmp_path, learner=learner)
    step = recorded.step(2)
    everything = TrajectoryStore(recorded.folder.trajectories).read(2)
    assert step.batch.equals(take_rows(everything, range(12))), "the last group of four was filtered"
    assert (step.records is not None) == learner
    if learner:
        assert join(step.batch, step.records).tolist() == list(range(12))
        assert LearnerBatch(step.records).taught.all()
    assert step.metrics["learner/loss"] == 0.01


def test_a_dump_of_failures_only_is_refused(tmp_path):
    recorded = run(tmp_path)
    batch = recorded.trajectories.read(2)
    remove(recorded, 2)
    recorded.trajectories.write(2, take_rows(batch, range(1, batch.num_rows)))
    with pytest.raises(RecordedError, match="has 3 of 4 samples"):
        recorded.step(2)


def test_records_of_another_step_are_refused(tmp_path):
    recorded = run(tmp_path)
    source = recorded.records.folder_of(3, "training")
    target = recorded.records.folder_of(2, "training")
    shutil.rmtree(target)
    shutil.copytree(source, target)
    with pytest.raises(RecordedError, match="16 of 16 trajectories of a step have no learner record"):
        recorded.step(2)


def test_a_truncated_dump_is_a_sentence(tmp_path):
    recorded = run(tmp_path)
    (path,) = recorded.trajectories.folder_of(2, "training").iterdir()
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(RecordedError, match="truncated, damaged or foreign"):
        recorded.step(2)


def test_a_run_that_never_trained_has_nothing_to_replay(tmp_path):
    recorded = run(tmp_path)
    shutil.rmtree(recorded.folder.trajectories)
    (recorded.folder.path / "metrics.jsonl").unlink()
    again = RecordedRun(recorded.folder, recorded.config)
    with pytest.raises(RecordedError, match=r"step 1 was not dumped.*dumped: none"):
        again.start_for(1)
    with pytest.raises(RecordedError, match="numbered from 1"):
        again.start_for(0)
    with pytest.raises(RecordedError, match="ended before RL began"):
        _ = again.base
    assert LearnerStore(recorded.folder.learner_records).steps() == [1, 2, 3, 4, 5, 6]
