"""The masses of the last latent step, from rows alone."""

import dataclasses

import numpy as np
import pytest

from latent_grpo.common.schema import encode
from latent_grpo.common.types import SamplingSettings, Trajectory
from latent_grpo.deploy.reproduce.probe import last_step_masses

TEXTS = {1: "7", 2: "3", 3: "=", 4: ";"}


def row(ids, probabilities, gold="7", noise="off"):
    steps = len(ids)
    return Trajectory(
        purpose="evaluation", task="t", problem_uid="t/0", group_uid="g", sample_index=0, epoch=0, run_seed=0,
        policy_version_min=0, policy_version_max=0, engine="e",
        sampling=SamplingSettings(mode="latent", max_tokens=9, k=2, noise_mode=noise),
        prompt_ids=np.array([1], np.int32), latent_ids=np.array(ids, np.int32).reshape(steps, 2),
        latent_scores=np.log(np.array(probabilities, np.float32)).reshape(steps, 2),
        latent_log_probs=np.log(np.array(probabilities, np.float32)).reshape(steps, 2),
        hard_ids=np.array([5], np.int32), hard_log_probs=np.zeros(1, np.float32), finish_reason="stop",
        gold_answer=gold, reward=1.0,
    )  # fmt: skip


def test_only_the_last_step_of_noise_free_samples_counts():
    rows = [
        row([[3, 4], [1, 3]], [[0.9, 0.1], [0.6, 0.3]]),
        row([[2, 4]], [[0.5, 0.25]]),
        row([[1, 2]], [[1.0, 1e-9]], noise="one_sided"),
    ]
    found = last_step_masses(encode(rows, 2), TEXTS.get)
    assert found.samples == 2
    assert (found.answer, found.other_numbers, found.fillers) == pytest.approx((0.3, 0.25, (0.3 + 0.25) / 2))


def test_without_a_noise_free_latent_step_there_is_nothing_to_see():
    only_noisy = encode([row([[1, 2]], [[0.5, 0.5]], noise="one_sided")], 2)
    assert last_step_masses(only_noisy, TEXTS.get) is None
    explicit = dataclasses.replace(row([], []), latent_ids=np.zeros((0, 2), np.int32))
    assert last_step_masses(encode([explicit], 2), TEXTS.get) is None
