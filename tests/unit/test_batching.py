"""The plan covers every row once, respects the budget, and keeps ranks in step; the tensors are the record's."""

import dataclasses
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2Config

from latent_grpo.common.config import OptimizerConfig
from latent_grpo.common.schema import TrajectoryBatch, encode
from latent_grpo.common.types import SamplingSettings, Trajectory
from latent_grpo.learner.batching import Sharing, collate, group_indices, plan
from latent_grpo.learner.policy import PolicyModule
from latent_grpo.learner.zero_engine import learning_rate

CASES = st.fixed_dictionaries(
    {
        "rows": st.lists(st.tuples(st.integers(1, 30), st.integers(0, 40)), min_size=1, max_size=40),
        "samples": st.integers(1, 4),
        "minibatch_prompts": st.integers(1, 6),
        "ranks": st.integers(1, 4),
        "tokens": st.integers(1, 200),
        "chunk": st.integers(1, 50),
        "shared": st.booleans(),
    }
)


class Lengths(NamedTuple):
    prompts: np.ndarray
    fed: np.ndarray

    def of(self, sequence):
        return int(self.prompts[sequence[0]] + self.fed[list(sequence)].sum())

    @property
    def alone(self):
        return self.prompts + self.fed


def planned(case):
    prompts, steps = zip(*case["rows"], strict=True)
    groups = np.arange(len(prompts)) // case["samples"]
    prompts = np.array(prompts)[groups * case["samples"]]  # a group has one prompt
    lengths = Lengths(prompts, np.maximum(steps, 1) - 1)
    minis = plan(
        prompts,
        steps,
        groups,
        minibatch_prompts=case["minibatch_prompts"],
        ranks=case["ranks"],
        tokens_per_microbatch=case["tokens"],
        chunk_tokens=case["chunk"],
        sharing=Sharing(token_in_pairs=30) if case["shared"] else None,
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
            padded = len(micro.sequences) * max((lengths.of(s) for s in micro.sequences), default=0)
            assert padded <= case["tokens"] or len(rows) == 1
            assert steps[rows].sum() <= micro.chunks * case["chunk"]


@settings(max_examples=50, deadline=None)
@given(CASES)
def test_no_rank_has_a_longest_sequence_more_than_another(case):
    minis, _, _, lengths = planned(case)
    for mini in minis:
        sequences = [[lengths.of(s) for m in rank for s in m.sequences] for rank in mini.ranks]
        load = [sum(found) for found in sequences]
        assert max(load) - min(load) <= max(max(found, default=0) for found in sequences)


@settings(max_examples=150, deadline=None)
@given(CASES)
def test_samples_share_a_sequence_within_their_group_where_it_costs_less(case):
    minis, _, groups, lengths = planned(case)
    for mini in minis:
        sequences = [s for rank in mini.ranks for micro in rank for s in micro.sequences]
        assert len(sequences) >= min(len(mini.rows), case["ranks"])
        for rows in sequences:
            assert len({int(groups[row]) for row in rows}) == 1
            assert len(rows) == 1 or case["shared"]
            if len(rows) > 1:
                together = 30 * lengths.of(rows) + lengths.of(rows) ** 2
                apart = sum(30 * int(lengths.alone[row]) + int(lengths.alone[row]) ** 2 // 2 for row in rows)
                first = int(lengths.alone[rows[0]])
                assert together < apart + first**2 - first**2 // 2  # the first one's pairs were counted by half


@pytest.mark.parametrize("sharing", [None, Sharing(token_in_pairs=12_288)], ids=["alone", "shared"])
@pytest.mark.parametrize("longest", [60, 4000])
def test_little_is_padding_with_lengths_of_gsm8k_and_mixed_ones(longest, sharing):
    draw, groups = np.random.default_rng(0), np.repeat(np.arange(64), 8)
    prompts = np.repeat(draw.normal(160, 45, 64).clip(60, 400).astype(int), 8)
    steps = np.exp(draw.uniform(np.log(min(100, longest / 4)), np.log(longest), 512)).astype(int)
    lengths, real, computed = Lengths(prompts, steps - 1), 0, 0
    for mini in plan(
        prompts,
        steps,
        groups,
        minibatch_prompts=16,
        ranks=1,
        tokens_per_microbatch=16384,
        chunk_tokens=2048,
        sharing=sharing,
    ):
        for micro in mini.ranks[0]:
            sizes = [lengths.of(sequence) for sequence in micro.sequences]
            real += sum(sizes)
            computed += len(sizes) * max(sizes)
    assert real > 0.94 * computed


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
    inputs = collate(TrajectoryBatch(encode([row], 2)), [(0,)])
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
    inputs = collate(TrajectoryBatch(encode([trajectory(3, ()), trajectory(1, (4,))], 2)), [(0,), (1,)])
    assert inputs.ids.shape == (2, 5)
    assert inputs.fed_rows.tolist() == [0, 0, 1]
    assert inputs.fed_positions.tolist() == [3, 4, 3]
    assert inputs.batch_rows.tolist() == [0, 0, 0, 1, 1]
    assert inputs.steps.tolist() == [0, 1, 2, 0, 1]


def test_an_empty_micro_batch_and_explicit_rows_are_well_formed():
    view = TrajectoryBatch(encode([trajectory(0, (4, 1), k=0)], 0))
    explicit = collate(view, [(0,)])
    assert explicit.ids.tolist() == [[7, 8, 9, 4]]
    assert explicit.selected.tolist() == [[4], [1]]
    assert not explicit.latent.any()
    empty = collate(view, [], chunks=3)
    assert empty.ids.shape == (1, 1)
    assert empty.selected.shape == (0, 1)
    assert empty.chunks == 3


def group_of_samples():
    """Samples of one prompt: latent and visible, cut off in latent mode, of one step, and one of another group."""
    shapes = [(2, (4, 5, 1)), (3, ()), (1, (4,)), (1, ()), (0, (6, 1))]
    rows = [dataclasses.replace(trajectory(*shape), sample_index=i) for i, shape in enumerate(shapes)]
    return [*rows, dataclasses.replace(trajectory(2, (4, 1), prompt=(9, 8)), group_uid="h")]


def test_responses_lie_side_by_side_behind_their_prompt():
    view = TrajectoryBatch(encode(group_of_samples(), 2))
    inputs = collate(view, [(0, 2, 3), (5,)])
    assert inputs.ids.tolist() == [[7, 8, 9, 0, 0, 4, 5, 0], [9, 8, 0, 0, 4, 0, 0, 0]]
    assert inputs.responses.tolist() == [[0, 0, 0, 1, 1, 1, 1, 2], [0, 0, 1, 1, 1, 1, 1, 1]]
    assert inputs.position_ids[0].tolist() == [0, 1, 2, 3, 4, 5, 6, 3]
    assert inputs.positions.tolist() == [2, 3, 4, 5, 6, 2, 7, 2, 1, 2, 3, 4]
    assert inputs.fed_positions.tolist() == [3, 4, 7, 2, 3]
    mask = inputs.attention()["attention_mask"][0, 0]
    assert mask[7].tolist() == [True, True, True, False, False, False, False, True]
    assert mask[5].tolist() == [True, True, True, True, True, True, False, False]
    assert collate(view, [(0,), (5,)]).attention() == {}


@pytest.mark.parametrize("architecture", [LlamaConfig, Qwen2Config, GPT2Config])
def test_a_shared_prompt_changes_neither_log_probs_nor_gradients(architecture):
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 24,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    config = architecture(**sizes, initializer_range=0.3)
    module = PolicyModule(AutoModelForCausalLM.from_config(config, attn_implementation="sdpa"), freeze_embeddings=False)
    view = TrajectoryBatch(encode(group_of_samples(), 2))
    found = []
    for sequences in ([(0, 1, 2, 3, 4), (5,)], [(0, 1), (2, 3, 4), (5,)], [(i,) for i in range(6)]):
        module.zero_grad()
        inputs = collate(view, sequences)
        log_probs = module(inputs)
        factors = torch.cos(1.0 + 3 * inputs.batch_rows + 7 * inputs.steps)  # another one for each step
        (log_probs.sum(-1) * factors).sum().backward()
        order = np.lexsort((inputs.steps.numpy(), inputs.batch_rows.numpy()))
        gradient = torch.cat([p.grad.reshape(-1) for p in module.parameters()])
        found.append((log_probs.detach()[order], gradient))
    expected, want = found.pop()
    for log_probs, gradient in found:
        torch.testing.assert_close(log_probs, expected, atol=1e-5, rtol=1e-5)
        assert (gradient - want).norm() < 1e-5 * want.norm()


def test_the_learning_rate_warms_up_and_decays_to_zero():
    linear = OptimizerConfig(lr=1.0, warmup_steps=2, schedule="linear")
    assert [learning_rate(linear, step, 6) for step in range(7)] == pytest.approx([0.5, 1, 1, 0.75, 0.5, 0.25, 0])
    cosine = OptimizerConfig(lr=1.0, schedule="cosine", decay_steps=4)
    assert [learning_rate(cosine, step, 100) for step in (0, 2, 4, 9)] == pytest.approx([1, 0.5, 0, 0])
    assert learning_rate(OptimizerConfig(lr=1.0), 99, 100) == 1.0
