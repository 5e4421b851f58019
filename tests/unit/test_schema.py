"""The trajectory schema: rows survive encoding exactly, and a malformed batch is refused with the column's name."""

import dataclasses

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latent_grpo.common.schema import (
    SchemaError,
    TrajectoryBatch,
    concat,
    current,
    decode,
    encode,
    groups_of,
    schema_k,
    take_rows,
    trajectory_schema,
)
from latent_grpo.common.types import SamplingSettings, Trajectory


def trajectory(index=0, latent=2, hard=3, k=3, **changes):
    rng = np.random.default_rng(index)
    plain = Trajectory(
        run_id="run",
        purpose="training",
        task="t",
        problem_uid="t/0",
        group_uid="g0",
        sample_index=index,
        epoch=1,
        run_seed=2**40,
        policy_version_min=4,
        policy_version_max=5,
        engine="transformers",
        sampling=SamplingSettings(mode="latent" if k else "visible", max_tokens=9, k=max(k, 1), temperature=0.6),
        prompt_ids=np.arange(index + 1, dtype=np.int32),
        latent_ids=rng.integers(0, 99, (latent, k)).astype(np.int32),
        latent_scores=rng.normal(size=(latent, k)).astype(np.float32),
        latent_log_probs=rng.normal(size=(latent, k)).astype(np.float32),
        hard_ids=rng.integers(0, 99, hard).astype(np.int32),
        hard_log_probs=rng.normal(size=hard).astype(np.float32),
        finish_reason="stop",
        response_text="so \\boxed{3}",
        gold_answer="3",
        parsed_answer="3",
        reward=1.0,
        grade_reason="correct",
    )
    return dataclasses.replace(plain, **changes)


def assert_equal(a, b):
    for field in dataclasses.fields(Trajectory):
        left, right = getattr(a, field.name), getattr(b, field.name)
        if isinstance(left, np.ndarray):
            assert left.size == right.size == 0 or np.array_equal(left, right), field.name
            assert left.dtype == right.dtype, field.name
        else:
            assert left == right, field.name


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=6), k=st.integers(1, 5))
def test_rows_survive_encoding(lengths, k):
    rows = [trajectory(i, latent, hard, k) for i, (latent, hard) in enumerate(lengths)]
    for before, after in zip(rows, decode(encode(rows, k)), strict=True):
        assert_equal(before, after)


def test_rows_without_latent_steps_survive_with_k_0():
    rows = [trajectory(i, latent=0, k=0) for i in range(3)]
    batch = encode(rows, 0)
    assert schema_k(batch.schema) == 0
    assert TrajectoryBatch(batch).num_latent_steps.tolist() == [0, 0, 0]
    for before, after in zip(rows, decode(batch), strict=True):
        assert_equal(before, after)


def test_an_ungraded_row_reads_as_nan_and_none():
    batch = encode([trajectory(0, reward=None, parsed_answer=None, grade_reason="ungraded"), trajectory(1)], 3)
    assert np.isnan(TrajectoryBatch(batch).rewards[0])
    assert decode(batch)[0].reward is None
    assert decode(batch)[0].parsed_answer is None


def test_only_a_natural_stop_is_valid():
    batch = encode([trajectory(i, finish_reason=r) for i, r in enumerate(("stop", "length", "aborted"))], 3)
    assert TrajectoryBatch(batch).valid.tolist() == [True, False, False]


def test_a_slice_shows_its_own_rows_only():
    rows = [trajectory(i, latent=i, hard=i + 1) for i in range(5)]
    for before, after in zip(rows[2:4], decode(encode(rows, 3).slice(2, 2)), strict=True):
        assert_equal(before, after)


def test_taken_rows_are_self_contained_and_in_the_asked_order():
    batch = encode([trajectory(i, latent=i) for i in range(50)], 3)
    few = take_rows(batch, [7, 3])
    assert [t.sample_index for t in decode(few)] == [7, 3]
    assert few.nbytes < batch.nbytes / 5


def test_batches_are_joined_in_order():
    parts = [encode([trajectory(i)], 3) for i in range(3)]
    assert [t.sample_index for t in decode(concat(parts))] == [0, 1, 2]


def test_groups_of_a_batch_share_its_memory_and_join_to_batches_of_their_own():
    batch = encode([trajectory(i, group_uid=uid) for i, uid in enumerate("aabccc")], 3)
    groups = dict(groups_of(batch))
    assert {uid: [t.sample_index for t in decode(group)] for uid, group in groups.items()} == {
        "a": [0, 1],
        "b": [2],
        "c": [3, 4, 5],
    }
    sizes = [group.column("sample_index").buffers()[1].size for group in (concat([groups["b"]]), groups["b"])]
    assert sizes[0] < sizes[1]


def test_a_mixture_of_the_wrong_width_is_refused():
    with pytest.raises(SchemaError, match=r"latent_ids of row 0: expected shape \[L, 4\], got \[2, 3\]"):
        encode([trajectory()], 4)


def test_foreign_data_is_refused():
    with pytest.raises(SchemaError, match="not a trajectory batch"):
        TrajectoryBatch(pa.record_batch({"x": [1]}))


def test_a_batch_of_version_1_is_read_as_its_runs_left_latent_mode():
    """Version 1 lacks the rule; whatever version a store's files have, they can be joined and trained on together."""
    batch = encode([trajectory()], 3)
    place = batch.schema.get_field_index("sampling_latent_exit")
    metadata = {**batch.schema.metadata, b"latent_grpo.schema_version": b"1"}
    earlier = batch.remove_column(place).replace_schema_metadata(metadata)
    assert decode(earlier)[0].sampling.latent_exit == "argmax_or_first"
    assert current(earlier).equals(batch)
    assert current(earlier).schema.equals(batch.schema, check_metadata=True)
    assert current(batch) is batch
    with pytest.raises(SchemaError, match=r"missing .*sampling_tau"):
        TrajectoryBatch(earlier.remove_column(earlier.schema.get_field_index("sampling_tau")))


def test_another_version_is_refused_with_both_numbers():
    batch = encode([trajectory()], 3)
    other = batch.replace_schema_metadata({**batch.schema.metadata, b"latent_grpo.schema_version": b"99"})
    with pytest.raises(SchemaError, match="version 99, this program reads versions 1 and 2"):
        TrajectoryBatch(other)


def test_a_missing_and_an_unknown_column_are_named():
    batch = encode([trajectory()], 3)
    names = ["extra" if n == "reward" else n for n in batch.schema.names]
    other = batch.rename_columns(names).replace_schema_metadata(batch.schema.metadata)
    with pytest.raises(SchemaError, match=r"missing \['reward'\], unknown \['extra'\]"):
        TrajectoryBatch(other)


def replaced(batch, name, array):
    columns = [array if n == name else batch.column(n) for n in batch.schema.names]
    return pa.RecordBatch.from_arrays(columns, schema=batch.schema)


def test_a_non_finite_log_prob_is_refused():
    bad = trajectory(hard_log_probs=np.array([-1.0, np.nan, -1.0], np.float32))
    with pytest.raises(SchemaError, match="hard_log_probs: non-finite"):
        TrajectoryBatch(encode([bad], 3))


def test_a_null_inside_a_list_of_steps_is_refused():
    batch = encode([trajectory()], 3)
    kind = trajectory_schema(3).field("hard_ids").type
    with pytest.raises(SchemaError, match="hard_ids: nulls inside"):
        TrajectoryBatch(replaced(batch, "hard_ids", pa.array([[1, None, 2]], kind)))


def test_step_columns_of_different_length_are_refused():
    batch = encode([trajectory(latent=2)], 3)
    with pytest.raises(SchemaError, match="latent_ids: number of latent steps differs"):
        TrajectoryBatch(replaced(batch, "num_latent_steps", pa.array([3], pa.int32())))
    short = trajectory(hard_log_probs=np.zeros(1, np.float32))
    with pytest.raises(SchemaError, match="hard_ids and hard_log_probs differ"):
        TrajectoryBatch(encode([short], 3))
