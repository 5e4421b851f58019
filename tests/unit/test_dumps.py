"""The dump writer: training does not wait for the disk, nothing is lost, a failure stops the run, old steps go."""

import errno
import json
import threading

import numpy as np
import pytest
from fake_run import fake_config, fake_group, fake_records, fake_trajectory

from latent_grpo.common.config import ConfigError, DumpConfig, load_config
from latent_grpo.common.learner_record import LearnerBatch, decode_records, join
from latent_grpo.common.schema import TrajectoryBatch, concat, decode, encode
from latent_grpo.common.store import DumpError, LearnerStore, TrajectoryStore
from latent_grpo.deploy.run.dumps import DumpWriter, StepDump, failures
from latent_grpo.deploy.run.folder import RunFolder

RNG = np.random.default_rng(0)


def dump(step, groups=3):
    """The middle group was filtered."""
    made = [fake_group(np.random.default_rng(g), step, g, 4, 3, equal=g == 1) for g in range(groups)]
    taught = [fake_records(group, 0, RNG) for g, group in enumerate(made) if g != 1]
    reasons = tuple("all_equal" if g == 1 else None for g in range(groups))
    return StepDump(step=step, groups=tuple(made), reasons=reasons, records=concat(taught))


def writer(path, lineage=0, deadline_s=20.0, store=TrajectoryStore, **settings):
    folder = RunFolder(path)
    stores = store(folder.trajectories), LearnerStore(folder.learner_records)
    return DumpWriter(*stores, DumpConfig(**settings), lineage, deadline_s)


def steps_of(path):
    folder = RunFolder(path)
    return [store.steps() for store in (TrajectoryStore(folder.trajectories), LearnerStore(folder.learner_records))]


class Gate:
    """Makes stores on a disk that takes nothing until it is opened."""

    def __init__(self):
        self.open, self.entered = threading.Event(), threading.Event()

    def __call__(self, folder):
        gate = self

        class Gated(TrajectoryStore):
            def write(self, *arguments):
                gate.entered.set()
                assert gate.open.wait(20)
                return super().write(*arguments)

        return Gated(folder)


class Full(TrajectoryStore):
    """On a disk that holds nothing more."""

    def write(self, *arguments):
        raise DumpError(errno.ENOSPC, "trajectories not dumped: the disk is full", "x")


def test_every_trajectory_has_its_learner_record_in_the_same_order(tmp_path):
    with writer(tmp_path, lineage=2) as dumps:
        dumps.submit(dump(5))
    folder = RunFolder(tmp_path)
    trajectories = TrajectoryStore(folder.trajectories).read(5, lineage=2)
    records = LearnerStore(folder.learner_records).read(5, lineage=2)
    assert join(trajectories, records).tolist() == list(range(12))
    assert {r.outcome for r in decode_records(records)[4:8]} == {"filtered"}
    assert {r.reason for r in decode_records(records)[4:8]} == {"all_equal"}
    assert LearnerBatch(records).taught.sum() == 8


def test_training_goes_on_while_the_disk_is_busy_and_waits_only_when_the_queue_is_full(tmp_path):
    gate = Gate()
    with writer(tmp_path, store=gate, queue=2) as dumps:
        dumps.submit(dump(1))
        assert gate.entered.wait(20)
        dumps.submit(dump(2))  # these two wait in the queue
        dumps.submit(dump(3))
        held = threading.Thread(target=dumps.submit, args=(dump(4),))
        held.start()
        held.join(0.3)
        assert held.is_alive(), "the queue holds two steps"
        gate.open.set()
        held.join(20)
        assert not held.is_alive()
    assert steps_of(tmp_path) == [[1, 2, 3, 4], [1, 2, 3, 4]]


def test_flush_returns_when_everything_is_on_the_disk(tmp_path):
    gate = Gate()
    with writer(tmp_path, store=gate) as dumps:
        dumps.submit(dump(1))
        threading.Timer(0.2, gate.open.set).start()
        dumps.flush()
        assert steps_of(tmp_path) == [[1], [1]]


def test_a_full_disk_is_raised_at_the_next_step_with_its_reason(tmp_path):
    dumps = writer(tmp_path, store=Full)
    dumps.submit(dump(1))
    with pytest.raises(DumpError, match="disk is full"):
        dumps.flush()
    with pytest.raises(DumpError, match="disk is full"):
        dumps.submit(dump(2))


def test_a_failure_after_the_last_step_is_raised_at_the_end(tmp_path):
    with pytest.raises(DumpError, match="disk is full"), writer(tmp_path, store=Full) as dumps:
        dumps.submit(dump(1))


def test_an_error_of_the_run_is_not_hidden_by_the_end_of_its_dumps(tmp_path):
    def interrupted():
        with writer(tmp_path) as dumps:
            dumps.submit(dump(1))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert steps_of(tmp_path) == [[1], [1]]


def test_a_disk_that_hangs_is_an_error_after_the_deadline(tmp_path):
    gate = Gate()
    dumps = writer(tmp_path, store=gate, deadline_s=0.2)
    dumps.submit(dump(1))
    with pytest.raises(DumpError, match=r"deadlines\.dump_s"):
        dumps.flush()
    gate.open.set()


def test_failures_only_leaves_out_what_ended_and_was_graded_right(tmp_path):
    with writer(tmp_path, which="failures") as dumps:
        dumps.submit(dump(1))
    folder = RunFolder(tmp_path)
    kept = TrajectoryStore(folder.trajectories).read(1)
    everything = concat(dump(1).groups)
    assert len(failures(everything)) == kept.num_rows < everything.num_rows
    assert not [t for t in decode(kept) if t.finish_reason == "stop" and t.reward == 1.0]
    reasons = {t.grade_reason for t in decode(kept)}
    assert {"wrong", "ungraded"} <= reasons
    assert join(kept, LearnerStore(folder.learner_records).read(1)).tolist() == list(range(kept.num_rows))


def test_a_partial_reward_is_a_failure_and_a_correct_answer_with_less_than_1_is_none():
    rng = np.random.default_rng(0)
    verdicts = [("wrong", 0.3), ("correct", 0.7), ("correct", 1.0), ("no_answer", 0.0)]
    rows = [fake_trajectory(rng, step=1, group=0, index=i, reward=v, reason=r) for i, (r, v) in enumerate(verdicts)]
    assert failures(encode(rows, 3)).tolist() == [0, 3]


def test_only_the_newest_steps_stay(tmp_path):
    with writer(tmp_path, keep_steps=2) as dumps:
        for step in (10, 20, 30):
            dumps.submit(dump(step))
    assert steps_of(tmp_path) == [[20, 30], [20, 30]]
    with writer(tmp_path, lineage=1, keep_steps=2) as dumps:  # a resumed run counts what is there
        dumps.submit(dump(40))
    assert steps_of(tmp_path) == [[30, 40], [30, 40]]
    assert not list(tmp_path.rglob(".tmp-*"))


def test_the_oldest_steps_go_when_the_dumps_are_too_large_but_never_the_newest(tmp_path):
    with writer(tmp_path) as dumps:
        dumps.submit(dump(1))
    size = sum(p.stat().st_size for p in tmp_path.rglob("*.parquet"))
    with writer(tmp_path, keep_bytes=int(2.5 * size)) as dumps:
        for step in (2, 3, 4):
            dumps.submit(dump(step))
    assert steps_of(tmp_path) == [[3, 4], [3, 4]]
    with writer(tmp_path, keep_bytes=1) as dumps:
        dumps.submit(dump(5))
    assert steps_of(tmp_path) == [[5], [5]]


def test_due_steps_are_every_nth_the_first_and_those_after_a_checkpoint():
    base = json.loads(fake_config().model_dump_json())
    config = load_config(base, ["dump.every=10", "checkpoint.every=25"])
    assert [s for s in range(1, 61) if config.dump_due(s)] == [1, 10, 20, 26, 30, 40, 50, 51, 60]
    plain = load_config(base, ["dump.every=10", "checkpoint.every=25", "dump.after_checkpoint=false"])
    assert [s for s in range(1, 61) if plain.dump_due(s)] == [10, 20, 30, 40, 50, 60]
    assert not any(load_config(base, ["dump.every=0"]).dump_due(s) for s in range(1, 61))
    with pytest.raises(ConfigError, match=r"dump.which.*'failures'"):
        load_config(base, ["dump.which=some"])
    with pytest.raises(ConfigError, match=r"dump\.which, dump\.keep_steps would have no effect with dump.every 0"):
        load_config(base, ["dump.every=0", "dump.which=failures", "dump.keep_steps=3"])


def test_rows_of_a_dump_are_those_of_its_groups(tmp_path):
    with writer(tmp_path) as dumps:
        dumps.submit(dump(1))
    batch = TrajectoryStore(RunFolder(tmp_path).trajectories).read(1)
    assert batch.equals(concat(dump(1).groups))
    assert len(TrajectoryBatch(batch)) == 12


def test_a_run_that_went_back_loses_its_abandoned_steps_first(tmp_path):
    with writer(tmp_path) as dumps:
        for step in range(1, 11):
            dumps.submit(dump(step))
    with writer(tmp_path, keep_steps=3) as resumed:  # resumed from the checkpoint of step 5
        for step in (6, 7):
            resumed.submit(dump(step))
    assert steps_of(tmp_path) == [[5, 6, 7], [5, 6, 7]]
