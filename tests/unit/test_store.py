"""The trajectory store: whole files or none, abandoned steps apart, foreign files refused in a sentence."""

import errno
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_run import damage_page

from latent_grpo.common.schema import TrajectoryBatch, encode
from latent_grpo.common.store import DumpError, TrajectoryStore, count_rows, read_columns, read_dump
from latent_grpo.common.types import SamplingSettings, Trajectory


def trajectory(index=0, steps=2, k=3):
    return Trajectory(
        purpose="training",
        task="t",
        problem_uid="t/0",
        group_uid="g0",
        sample_index=index,
        epoch=0,
        run_seed=1,
        policy_version_min=4,
        policy_version_max=5,
        engine="transformers",
        sampling=SamplingSettings(mode="latent" if k else "visible", max_tokens=9, k=max(k, 1)),
        prompt_ids=np.array([1, 2], np.int32),
        latent_ids=np.arange(steps * k, dtype=np.int32).reshape(steps, k),
        latent_scores=np.full((steps, k), -0.5, np.float32),
        latent_log_probs=np.full((steps, k), -1.5, np.float32),
        hard_ids=np.array([7, 8], np.int32),
        hard_log_probs=np.array([-0.25, -0.5], np.float32),
        finish_reason="stop",
    )


def batch(rows=2, steps=2, k=3):
    return encode([trajectory(i, steps, k) for i in range(rows)], k)


@pytest.mark.parametrize(("steps", "k"), [(2, 3), (0, 3), (0, 0)])
def test_what_was_written_is_read_back_exactly(tmp_path, steps, k):
    store = TrajectoryStore(tmp_path)
    written = batch(3, steps, k)
    path = store.write(10, written, "training", 2)
    assert path.relative_to(tmp_path).as_posix() == "training/step=10/lineage-0002-part-0000.parquet"
    assert store.read(10).equals(written)
    assert TrajectoryBatch(store.read(10)).k == k


def test_an_empty_batch_round_trips(tmp_path):
    store = TrajectoryStore(tmp_path)
    store.write(1, batch(0))
    assert store.read(1).num_rows == 0


def test_a_second_batch_of_a_step_does_not_replace_the_first(tmp_path):
    store = TrajectoryStore(tmp_path)
    store.write(1, batch(2))
    store.write(1, batch(3))
    assert store.read(1).num_rows == 5
    assert [b.num_rows for _, b in store.batches(1)] == [2, 3]


def test_purposes_are_kept_apart(tmp_path):
    store = TrajectoryStore(tmp_path)
    store.write(1, batch(2), "training")
    store.write(1, batch(3), "evaluation")
    assert store.read(1).num_rows == 2
    assert store.read(1, purpose="evaluation").num_rows == 3
    assert store.read(1, purpose=None).num_rows == 5


def test_steps_that_a_restart_abandoned_are_left_out_but_not_lost(tmp_path):
    store = TrajectoryStore(tmp_path)
    for step in (1, 2, 3, 4):
        store.write(step, batch(1), lineage=0)
    store.write(3, batch(2), lineage=1)  # restarted from the checkpoint of step 2
    assert [(f.step, f.lineage) for f in store.files()] == [(1, 0), (2, 0), (3, 1)]
    assert store.read(4, lineage=0).num_rows == 1
    assert store.steps() == [1, 2, 3]


def test_a_missing_step_names_those_that_exist(tmp_path):
    store = TrajectoryStore(tmp_path)
    for step in (1, 2, 3, 8):
        store.write(step, batch(1))
    with pytest.raises(DumpError, match=r"no trajectories of step 5.*1-3, 8"):
        store.read(5)


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.9, 0.999])
def test_a_truncated_file_is_refused_in_a_sentence(tmp_path, keep):
    path = TrajectoryStore(tmp_path).write(1, batch(50))
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(DumpError, match=f"{path.name}.*truncated"):
        read_dump(path)


def test_a_flipped_byte_is_noticed(tmp_path):
    path = TrajectoryStore(tmp_path).write(1, batch(50))
    content = bytearray(path.read_bytes())
    content[200] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(DumpError, match="damaged"):
        read_dump(path)


@pytest.mark.parametrize("column", ["problem_uid", "prompt_ids", "latent_scores", "hard_log_probs", "reward"])
def test_a_damaged_data_page_is_noticed_by_whoever_reads_its_column_and_by_nobody_else(tmp_path, column):
    path = TrajectoryStore(tmp_path).write(1, batch(50))
    damage_page(path, column)
    for read in (lambda: read_dump(path), lambda: read_columns(path, ["sample_index", column])):
        with pytest.raises(
            DumpError, match=rf"{path.name}: not a readable Parquet file \({path.stat().st_size} bytes\).*damaged"
        ):
            read()
    assert read_columns(path, ["sample_index"])["sample_index"].to_pylist() == list(range(50))
    assert count_rows(path) == 50


def test_a_damaged_byte_anywhere_gives_the_rows_that_were_written_or_a_sentence(tmp_path):
    path = TrajectoryStore(tmp_path).write(1, batch(5))
    good, written, refused = path.read_bytes(), read_dump(path), []
    for place in range(0, len(good), 7):
        path.write_bytes(good[:place] + bytes([good[place] ^ 0xC0]) + good[place + 1 :])
        try:
            assert read_dump(path).equals(written)
        except DumpError as error:
            refused.append(str(error))
    assert all(path.name in sentence for sentence in refused)
    assert len(refused) > len(good) / 7 / 2


def test_a_foreign_parquet_file_is_refused(tmp_path):
    path = tmp_path / "lineage-0000-part-0000.parquet"
    pq.write_table(pa.table({"x": [1, 2]}), path)
    with pytest.raises(DumpError, match="no trajectories that can be read"):
        read_dump(path)


def test_a_dump_of_another_schema_version_is_refused_with_the_version(tmp_path):
    path = TrajectoryStore(tmp_path).write(1, batch())
    table = pq.read_table(path)
    pq.write_table(table.replace_schema_metadata({**table.schema.metadata, b"latent_grpo.schema_version": b"0"}), path)
    with pytest.raises(
        DumpError, match=r"schema version 0, this program reads versions 1 and 2; read it with the program"
    ):
        read_dump(path)


def test_a_malformed_batch_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="not a trajectory batch"):
        TrajectoryStore(tmp_path).write(1, pa.record_batch({"x": [1]}))
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_reported_with_its_remedy_and_leaves_nothing(tmp_path, before_fsync):
    store = TrajectoryStore(tmp_path)

    def full():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before_fsync(full)
    with pytest.raises(DumpError, match=r"disk is full.*dump.every") as caught:
        store.write(1, batch())
    assert caught.value.errno == errno.ENOSPC
    assert store.files() == []
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_a_file_that_is_being_written_is_invisible_to_readers(tmp_path, before_fsync):
    store = TrajectoryStore(tmp_path)
    store.write(1, batch(1))
    seen = []
    before_fsync(lambda: seen.append(store.read(1).num_rows))
    store.write(1, batch(1))
    assert seen[0] == 1
    assert store.read(1).num_rows == 2
