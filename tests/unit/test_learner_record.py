"""Learner records: they survive encoding and the store, join their trajectories, and say why a row taught nothing."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_run import fake_group, fake_records, fake_run

from latent_grpo.common.learner_record import (
    OUTCOMES,
    REASONS,
    STEP_COLUMNS,
    LearnerBatch,
    decode_records,
    encode_records,
    filtered_records,
    join,
    record_schema,
)
from latent_grpo.common.schema import Ragged, SchemaError, TrajectoryBatch, concat, decode, take_rows
from latent_grpo.common.store import DumpError, LearnerStore, TrajectoryStore

RNG = np.random.default_rng(0)


def records(step=1):
    made = [fake_group(np.random.default_rng(g), step, g, 4, 3) for g in range(3)]
    rows = [fake_records(made[0], 0, RNG), filtered_records(made[1], "all_equal")]
    return made, concat([*rows, fake_records(made[2], 1, RNG)])


def test_rows_of_trained_and_filtered_groups_survive_the_store(tmp_path):
    _, batch = records()
    store = LearnerStore(tmp_path)
    path = store.write(1, batch, lineage=2)
    assert path.relative_to(tmp_path).as_posix() == "training/step=1/lineage-0002-part-0000.parquet"
    assert store.read(1).equals(batch)
    view = LearnerBatch(store.read(1))
    assert view.taught.tolist() == [True] * 4 + [False] * 4 + [True] * 4
    assert view.steps("ratios").lengths[4:8].tolist() == [0, 0, 0, 0]


def test_every_taught_row_has_one_value_a_response_step():
    made, batch = records()
    trajectories, view = TrajectoryBatch(concat(made)), LearnerBatch(batch)
    for name in STEP_COLUMNS:
        assert np.array_equal(view.steps(name).lengths[view.taught], trajectories.num_steps[view.taught]), name


def test_rows_for_people_are_null_where_the_group_was_not_trained_on():
    _, batch = records()
    rows = decode_records(batch)
    assert (rows[4].outcome, rows[4].reason, rows[4].advantage, rows[4].winner) == ("filtered", "all_equal", None, None)
    assert len(rows[4].ratios) == 0
    assert np.allclose(rows[0].ratios, np.exp(rows[0].new_log_probs - rows[0].old_log_probs))
    assert {row.outcome for row in rows} <= OUTCOMES.keys()
    assert {row.reason for row in rows} <= REASONS.keys()


def test_trajectories_find_their_rows_in_any_order():
    made, batch = records()
    trajectories = concat(made[::-1])
    rows = join(trajectories, batch)
    for trajectory, row in zip(decode(trajectories), rows, strict=True):
        record = decode_records(batch)[row]
        assert (record.group_uid, record.sample_index) == (trajectory.group_uid, trajectory.sample_index)
    assert join(concat(made), take_rows(batch, [0, 1])).tolist() == [0, 1] + [-1] * 10


def test_a_log_prob_that_is_not_a_number_is_kept(tmp_path):
    _, batch = records()
    old = np.array(LearnerBatch(batch).steps("old_log_probs").values)
    old[0] = np.nan
    column = batch.column("old_log_probs")
    bad = pa.ListArray.from_arrays(column.offsets, pa.array(old), type=column.type, mask=column.is_null())
    columns = [bad if name == "old_log_probs" else batch.column(name) for name in batch.schema.names]
    store = LearnerStore(tmp_path)
    store.write(1, pa.RecordBatch.from_arrays(columns, schema=batch.schema))
    assert np.isnan(decode_records(store.read(1))[0].old_log_probs[0])


def test_a_missing_column_and_unequal_lengths_are_refused():
    with pytest.raises(SchemaError, match=r"missing .*'advantage'"):
        encode_records({"group_uid": ["g"]}, {})
    _, batch = records()
    rows = {name: batch.column(name) for name in batch.schema.names if name not in STEP_COLUMNS}
    steps = {name: LearnerBatch(batch).steps(name) for name in STEP_COLUMNS}
    steps["ratios"] = Ragged(steps["ratios"].values, steps["ratios"].offsets[:-1])
    with pytest.raises(SchemaError, match="columns of different length"):
        encode_records(rows, steps)


def test_step_columns_that_disagree_are_refused():
    _, batch = records()
    short = pa.array([[1.0]] * len(batch), record_schema().field("ratios").type)
    columns = [short if name == "ratios" else batch.column(name) for name in batch.schema.names]
    with pytest.raises(SchemaError, match="ratios: number of steps differs"):
        LearnerBatch(pa.RecordBatch.from_arrays(columns, schema=batch.schema))


def test_foreign_and_old_files_are_refused_with_what_they_are(tmp_path):
    with pytest.raises(SchemaError, match="not a batch of learner records"):
        LearnerBatch(pa.record_batch({"x": [1]}))
    made, batch = records()
    old = batch.replace_schema_metadata({b"latent_grpo.learner_record_version": b"0"})
    with pytest.raises(SchemaError, match="version 0, this program reads version 1"):
        LearnerBatch(old)
    path = LearnerStore(tmp_path).write(1, batch)
    pq.write_table(pa.Table.from_batches([concat(made)]), path)
    with pytest.raises(DumpError, match="no learner records that can be read"):
        LearnerStore(tmp_path).read(1)


def test_the_fake_run_is_readable(tmp_path):
    folder = fake_run(tmp_path / "run")
    for step in (1, 2, 3):
        trajectories = TrajectoryStore(folder.trajectories).read(step)
        assert sorted(join(trajectories, LearnerStore(folder.learner_records).read(step))) == list(range(16))
    assert folder.config().steps == 3
