"""The plan covers every row once, respects the budget, and keeps ranks in step; the tensors are the record's."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latent_grpo.common.config import OptimizerConfig
from latent_grpo.common.schema import TrajectoryBatch, encode
from latent_grpo.common.types import SamplingSettings, Trajectory
from latent_grpo.learner.batching import collate, group_indices, plan
from latent_grpo.learner.zero_engine import learning_rate

CASES = st.fixed_dictionaries(
    {
        "rows": st.lists(st.tuples(st.integers(1, 30), st.integers(0, 40)), min_size=1, max_size=40),
        "samples": st.integers(1, 4),
        "minibatch_prompts": st.integers(1, 6),
        "ranks": st.integers(1, 4),
        "tokens": st.integers(1, 200),
        "chunk": st.integers(1, 50),
    }
)


def planned(case):
    prompts, steps = zip(*case["rows"], strict=True)
    groups = np.arange(len(prompts)) // case["samples"]
    lengths = np.array(prompts) + np.maximum(steps, 1) - 1
    minis = plan(
        prompts,
        steps,
        groups,
        minibatch_prompts=case["minibatch_prompts"],
        ranks=case["ranks"],
        tokens_per_microbatch=case["tokens"],
        chunk_tokens=case["chunk"],
    )
    return minis, np.array(steps), groups, lengths


@settings(max_examples=150, deadline=None)
@given(CASES)
def test_every_row_is_trained_on_once_in_its_prompts_mini_batch(case):
    minis, _, groups, _ = planned(case)
    assert [row for mini in minis for row in mini.rows] == list(range(len(groups)))
    for number, mini in enumerate(minis):
        assert sorted(row for rank in mini.ranks for micro in rank for row in micro.rows) == list(mini.rows)
        assert {int(g) // case["minibatch_prompts"] for g in groups[list(mini.rows)]} == {number}


@settings(max_examples=150, deadline=None)
@given(CASES)
def test_ranks_make_equally_many_calls_within_the_budget(case):
    minis, steps, _, lengths = planned(case)
    for mini in minis:
        assert len(mini.ranks) == case["ranks"]
        assert len({tuple(micro.chunks for micro in rank) for rank in mini.ranks}) == 1
        for micro in (m for rank in mini.ranks for m in rank):
            rows = list(micro.rows)
            padded = len(rows) * lengths[rows].max(initial=0)
            assert padded <= case["tokens"] or len(rows) == 1
            assert steps[rows].sum() <= micro.chunks * case["chunk"]


@settings(max_examples=50, deadline=None)
@given(CASES)
def test_no_rank_has_a_longest_row_more_than_another(case):
    minis, _, _, lengths = planned(case)
    for mini in minis:
        load = [sum(int(lengths[list(m.rows)].sum()) for m in rank) for rank in mini.ranks]
        assert max(load) - min(load) <= lengths[list(mini.rows)].max()


def test_groups_are_numbered_in_the_order_of_the_batch():
    assert group_indices(["b", "b", "a", "b"]).tolist() == [0, 0, 1, 0]


def trajectory(latents, hard, k=2, prompt=(7, 8, 9)):
    draw = np.random.default_rng(latents * 10 + len(hard))
    return Trajectory(
        purpose="training", task="t", problem_uid="t0", group_uid="g", sample_index=0, epoch=0, run_seed=0,
        policy_version_min=0, policy_version_max=0, engine="test",
        sampling=SamplingSettings(mode="latent", max_tokens=9, k=k, tau=2.0, temperature=0.5),
        prompt_ids=np.array(prompt, np.int32),
        latent_ids=draw.integers(10, 20, (latents, k)).astype(np.int32),
        latent_scores=draw.normal(size=(latents, k)).astype(np.float32),
        latent_log_probs=draw.normal(size=(latents, k)).astype(np.float32),
        hard_ids=np.array(hard, np.int32), hard_log_probs=-np.arange(1, len(hard) + 1, dtype=np.float32),
        finish_reason="stop" if len(hard) else "length",
    )  # fmt: skip


def test_a_response_is_fed_but_for_its_last_step_and_predicted_from_the_position_before():
    row = trajectory(2, (4, 5, 1))
    inputs = collate(TrajectoryBatch(encode([row], 2)), [0])
    assert inputs.ids.tolist() == [[7, 8, 9, 0, 0, 4, 5]]
    assert inputs.fed_positions.tolist() == [3, 4]
    assert inputs.fed_ids.tolist() == row.latent_ids.tolist()
    torch.testing.assert_close(inputs.fed_weights, torch.softmax(torch.tensor(row.latent_scores) / 2.0, -1))
    assert inputs.positions.tolist() == [2, 3, 4, 5, 6]
    assert inputs.latent.tolist() == [True, True, False, False, False]
    assert inputs.temperatures.tolist() == [1.0, 1.0, 0.5, 0.5, 0.5]
    assert inputs.selected.tolist() == [*row.latent_ids.tolist(), [4, 4], [5, 5], [1, 1]]
    assert inputs.behaviour[2:, 0].tolist() == [-1.0, -2.0, -3.0]


def test_a_response_that_ends_in_latent_mode_does_not_feed_its_last_mixture():
    inputs = collate(TrajectoryBatch(encode([trajectory(3, ()), trajectory(1, (4,))], 2)), [0, 1])
    assert inputs.ids.shape == (2, 5)
    assert inputs.fed_rows.tolist() == [0, 0, 1]
    assert inputs.fed_positions.tolist() == [3, 4, 3]
    assert inputs.batch_rows.tolist() == [0, 0, 0, 1, 1]
    assert inputs.steps.tolist() == [0, 1, 2, 0, 1]


def test_an_empty_micro_batch_and_explicit_rows_are_well_formed():
    view = TrajectoryBatch(encode([trajectory(0, (4, 1), k=0)], 0))
    explicit = collate(view, [0])
    assert explicit.ids.tolist() == [[7, 8, 9, 4]]
    assert explicit.selected.tolist() == [[4], [1]]
    assert not explicit.latent.any()
    empty = collate(view, [], chunks=3)
    assert empty.ids.shape == (1, 1)
    assert empty.selected.shape == (0, 1)
    assert empty.chunks == 3


def test_the_learning_rate_warms_up_and_decays_to_zero():
    linear = OptimizerConfig(lr=1.0, warmup_steps=2, schedule="linear")
    assert [learning_rate(linear, step, 6) for step in range(7)] == pytest.approx([0.5, 1, 1, 0.75, 0.5, 0.25, 0])
    cosine = OptimizerConfig(lr=1.0, schedule="cosine", decay_steps=4)
    assert [learning_rate(cosine, step, 100) for step in (0, 2, 4, 9)] == pytest.approx([1, 0.5, 0, 0])
    assert learning_rate(OptimizerConfig(lr=1.0), 99, 100) == 1.0
