"""METHOD §4: advantages, first-token selection, groups with signal."""

import numpy as np
import pytest
import torch

from latent_grpo.learner.advantages import first_token_mask, group_advantages, keep_groups


def advantages(rewards, valid, **settings):
    return group_advantages(np.array(rewards, float), np.zeros(len(rewards), int), np.array(valid, bool), **settings)


def test_statistics_use_the_sample_standard_deviation_of_valid_samples():
    got = advantages([1, 0, 0, 1], [1, 1, 1, 0])
    s = np.array([1.0, 0, 0])
    want = (s - s.mean()) / (s.std(ddof=1) + 1e-6)
    np.testing.assert_allclose(got, [*want, 0.0], atol=1e-6)
    assert got.dtype == np.float32


def test_masking_modes_differ_in_who_enters_and_who_keeps_an_advantage():
    rewards, valid = [1, 0, 0, 0], [1, 1, 1, 0]
    include, off = (advantages(rewards, valid, masking=m) for m in ("include", "off"))
    whole = (np.array(rewards) - 0.25) / (np.std(rewards, ddof=1) + 1e-6)
    np.testing.assert_allclose(off, whole, atol=1e-6)
    np.testing.assert_allclose(include, [*whole[:3], 0.0], atol=1e-6)


@pytest.mark.parametrize("rewards", [[1, 1, 1], [0, 0, 0], [0.3, 0.3, 0.3]])
def test_a_group_without_signal_gets_exactly_zero(rewards):
    assert (advantages(rewards, [1, 1, 1]) == 0).all()
    assert (advantages(rewards, [1, 1, 1], scale_by_std=False) == 0).all()


def test_one_valid_sample_has_no_statistics():
    assert (advantages([1, 0, 0], [1, 0, 0]) == 0).all()
    assert keep_groups([1, 0, 0], [0, 0, 0], [1, 0, 0]).reasons == ("too_few_valid",)


def test_ungraded_samples_are_excluded_in_every_mode():
    for masking in ("exclude", "include", "off"):
        got = advantages([1, 0, np.nan], [1, 1, 1], masking=masking)
        np.testing.assert_allclose(got[:2], advantages([1, 0], [1, 1], masking=masking))
        assert got[2] == 0


def test_groups_may_be_interleaved_and_torch_comes_back_as_torch():
    rewards, groups = torch.tensor([1.0, 0.0, 0.0, 2.0]), torch.tensor([7, 7, 3, 3])
    order = torch.tensor([2, 0, 3, 1])
    got = group_advantages(rewards, groups, torch.ones(4, dtype=torch.bool), scale_by_std=False)
    assert got.tolist() == [0.5, -0.5, -1.0, 1.0]
    shuffled = group_advantages(rewards[order], groups[order], torch.ones(4, dtype=torch.bool), scale_by_std=False)
    assert torch.equal(shuffled, got[order])


def test_the_winner_is_the_likeliest_valid_positive_sample_ties_to_the_first():
    groups, valid = np.array([0] * 5), np.array([1, 1, 1, 1, 0], bool)
    advantage = np.array([-1, 1, 1, 1, 1.0], np.float32)
    mask = first_token_mask(advantage, groups, valid, np.array([0.0, -2, -1, -1, 5]))
    assert mask.tolist() == [False, False, True, False, False]


def test_a_group_without_a_positive_sample_is_left_as_it_is():
    mask = first_token_mask(np.array([0, -1.0]), np.array([4, 4]), np.array([True, True]), np.array([0.0, 0.0]))
    assert mask.all()


def test_drop_reasons_name_why_a_group_teaches_nothing():
    found = keep_groups([1, 1, np.nan, np.nan, 1, 0], [7, 7, 8, 8, 9, 9], [1, 1, 1, 1, 1, 1])
    assert (found.groups.tolist(), found.reasons) == ([7, 8, 9], ("all_equal", "ungraded", ""))
    assert found.kept.tolist() == [False, False, True]
    assert keep_groups([1, 0, 0], [0, 0, 0], [0, 0, 0], masking="include").reasons == ("no_advantage",)
    assert keep_groups([1, 0, 0], [0, 0, 0], [0, 0, 0], masking="off").reasons == ("",)
