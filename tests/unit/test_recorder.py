"""What the learner reports of rows: order restored over ranks, and why a row taught nothing."""

import dataclasses

import numpy as np
import pytest
import torch
from fake_run import fake_trajectory

from latent_grpo.common.learner_record import CLIPS, STEP_COLUMNS, decode_records
from latent_grpo.common.schema import TrajectoryBatch, encode
from latent_grpo.learner.batching import collate
from latent_grpo.learner.objective import clip_codes
from latent_grpo.learner.recorder import RowFacts, StepCollector, UpdateOutcome, assemble, flip_shares, mask_reasons


def batch(*changes, groups=1):
    rng, rows = np.random.default_rng(0), []
    for group in range(groups):
        for index, change in enumerate(changes):
            row = fake_trajectory(rng, step=1, group=group, index=index, reward=float(index % 2))
            rows.append(dataclasses.replace(row, **change))
    return encode(rows, 3)


def collected(view, rows):
    """Each step's value is 100 * row + step, so that a misplaced one shows."""
    collector = StepCollector()
    for part in rows:
        inputs = collate(view, [(row,) for row in part])
        value = (100 * inputs.batch_rows + inputs.steps).float()
        collector.add(inputs, **dict.fromkeys(STEP_COLUMNS, value) | {"clipped": inputs.steps % 4})
    return collector.batch()


def facts(rows):
    return RowFacts(
        advantages=np.arange(rows, dtype=np.float32),
        mean_old_log_probs=np.zeros(rows),
        keeps_first=np.arange(rows) % 2 == 1,
    )


SETTINGS = {"minibatch_prompts": 1, "masking": "exclude", "first_token": True}


def test_rows_come_back_in_the_batchs_order_whatever_rank_and_packing():
    trajectories = batch({}, {}, groups=2)
    view = TrajectoryBatch(trajectories)
    updates = [
        UpdateOutcome(loss=0.5, grad_norm=1.0, applied=True),
        UpdateOutcome(loss=0.25, grad_norm=2.0, applied=True),
    ]
    one = assemble(trajectories, [collected(view, [(0, 1), (2, 3)])], facts(4), updates, **SETTINGS)
    two = assemble(
        trajectories, [collected(view, [(3,), (1,)]), collected(view, [(2, 0), ()])], facts(4), updates, **SETTINGS
    )
    assert one.equals(two)
    for row, record in enumerate(decode_records(one)):
        assert record.old_log_probs.tolist() == [100 * row + t for t in range(view.num_steps[row])]
        assert (record.update_index, record.update_loss) == ((0, 0.5) if row < 2 else (1, 0.25))


def test_an_update_that_was_not_applied_skips_its_rows_only():
    trajectories = batch({}, {}, groups=2)
    share = collected(TrajectoryBatch(trajectories), [(0, 1, 2, 3)])
    updates = [
        UpdateOutcome(loss=float("nan"), grad_norm=float("nan"), applied=False),
        UpdateOutcome(loss=0.1, grad_norm=1.0, applied=True),
    ]
    records = decode_records(assemble(trajectories, [share], facts(4), updates, **SETTINGS))
    assert [(r.outcome, r.reason) for r in records] == [
        ("skipped", "non_finite"), ("skipped", "non_finite"), ("masked", "first_step"), ("trained", ""),
    ]  # fmt: skip
    assert [r.winner for r in records] == [False, True, False, True]


def test_why_a_row_taught_nothing():
    cases = batch({}, {"finish_reason": "length"}, {"reward": None}, {"finish_reason": "aborted", "reward": None}, {})
    keeps_first = np.array([True, True, True, True, False])
    view = TrajectoryBatch(cases)
    assert mask_reasons(view, keeps_first, "exclude").tolist() == ["", "invalid", "ungraded", "aborted", "first_step"]
    assert mask_reasons(view, keeps_first, "off").tolist() == ["", "", "ungraded", "aborted", "first_step"]


def test_the_flip_share_counts_components_below_their_noise_with_a_negative_advantage():
    inputs = collate(TrajectoryBatch(batch({"latent_scores": np.zeros((2, 3), np.float32),
                                            "latent_ids": np.zeros((2, 3), np.int32),
                                            "latent_log_probs": np.zeros((2, 3), np.float32)})), [(0,)])  # fmt: skip
    components = torch.full((5, 3), -1.0)
    components[0] = torch.tensor([1.0, 1.0, -1.0])  # d < 0 for two of three
    down, up = torch.full((5,), -1.0), torch.ones(5)
    assert flip_shares(components, inputs, down, "sign").tolist() == pytest.approx([2 / 3, 0, 0, 0, 0])
    assert flip_shares(components, inputs, up, "sign").sum() == 0
    assert flip_shares(components, inputs, down, "off").sum() == 0
    assert flip_shares(torch.ones(5, 3), inputs, down, "reference")[2:].sum() == 0, "hard steps have no components"


def test_clip_codes_name_the_bound():
    ratio = torch.tensor([0.5, 0.5, 1.5, 1.5, 4.0, 4.0, 1.0])
    advantages = torch.tensor([-1.0, 1.0, 1.0, -1.0, -1.0, 0.0, 1.0])
    codes = clip_codes(ratio, advantages, clip_low=0.2, clip_high=0.2, dual_clip=3.0)
    assert [CLIPS[code] for code in codes.tolist()] == ["low", "", "high", "", "dual", "", ""]
