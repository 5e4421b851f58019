"""Dumps are read by others' programs, with nothing of ours: DuckDB and pandas, while the run goes on."""

import numpy as np
import pytest
from fake_run import fake_run

from latent_grpo.common.store import TrajectoryStore

duckdb = pytest.importorskip("duckdb", reason="needs duckdb: pip install -e .[dev]")
pandas = pytest.importorskip("pandas")
TRAJECTORIES, RECORDS = "trajectories/**/*.parquet", "learner_records/**/*.parquet"


@pytest.fixture
def run(tmp_path):
    """Three steps of four groups; the last group of each was filtered."""
    return fake_run(tmp_path / "run").path


def test_a_file_that_is_being_written_is_not_among_what_a_pattern_finds(run, before_fsync):
    store, seen = TrajectoryStore(run / "trajectories"), []
    batch = store.read(1)
    count = f"select count(*) from '{run}/{TRAJECTORIES}'"
    before_fsync(lambda: seen.append(duckdb.sql(count).fetchall()[0][0]))
    store.write(4, batch)
    assert seen == [48, 64], "the file's own fsync comes before its name, the folder's after it"


def test_duckdb_joins_trajectories_with_what_the_learner_made_of_them(run):
    rows = duckdb.sql(
        f"""
        select t.step, l.outcome, l.reason, count(*) n, avg(t.reward) reward, avg(l.ratios[1]) first_ratio
        from read_parquet('{run}/{TRAJECTORIES}', hive_partitioning = true) t
        join read_parquet('{run}/{RECORDS}', hive_partitioning = true) l
          using (step, group_uid, sample_index)
        group by all order by all
        """
    ).fetchall()
    assert sum(row[3] for row in rows) == 48
    assert {row[0] for row in rows} == {1, 2, 3}
    filtered = [row for row in rows if row[1] == "filtered"]
    assert [row[2] for row in filtered] == ["all_equal"] * 3
    assert all(row[5] is None for row in filtered), "no learner columns where nothing was trained"
    assert all(row[5] > 0 for row in rows if row[1] != "filtered")


def test_duckdb_sees_latent_steps_as_lists_of_lists(run):
    steps, width, weight = duckdb.sql(
        f"""
        select min(len(latent_ids) - num_latent_steps), max(len(latent_scores[1])), sum(latent_log_probs[1][1])
        from '{run}/{TRAJECTORIES}'
        """
    ).fetchall()[0]
    assert (steps, width) == (0, 3)
    assert weight < 0


def test_pandas_reads_a_whole_run_with_the_step_from_the_folders(run):
    for name in ("trajectories", "learner_records"):
        everything = pandas.read_parquet(run / name)
        assert everything.groupby(everything.step.astype(int)).size().to_dict() == {1: 16, 2: 16, 3: 16}


def test_pandas_reads_a_step_with_its_lists(run):
    batch = pandas.read_parquet(run / "trajectories/training/step=2")
    records = pandas.read_parquet(run / "learner_records/training/step=2")
    together = batch.merge(records, on=["group_uid", "sample_index"], validate="one_to_one")
    assert len(together) == 16
    row = together[together.outcome == "masked"].iloc[0]
    assert len(row.ratios) == row.num_latent_steps + len(row.hard_ids)
    assert np.stack(row.latent_scores).shape == (row.num_latent_steps, 3)
    assert together.reward.isna().sum() == 4, "ungraded is null, not 0"
