"""Metrics of trajectories: shares, thinking ends, and the width of mixtures against plain formulas."""

import dataclasses

import numpy as np
import pytest
from fake_run import fake_trajectory

from latent_grpo.common.schema import encode
from latent_grpo.rollout_workers.metrics import mixture_entropy, rollout_metrics


def rows(*changes, k=3):
    rng = np.random.default_rng(0)
    made = [fake_trajectory(rng, step=1, group=0, index=i, k=k, reward=0.0) for i in range(len(changes))]
    return encode([dataclasses.replace(row, **change) for row, change in zip(made, changes, strict=True)], k)


def test_entropy_is_that_of_the_executed_mixture():
    scores = np.array([[0.0, 0.0, 0.0], [50.0, 0.0, 0.0], [1.0, 0.5, -2.0]], np.float32)
    tau = np.array([1.0, 1.0, 0.5], np.float32)
    entropy, top = mixture_entropy(scores, tau)
    weights = np.exp(scores[2] / 0.5) / np.exp(scores[2] / 0.5).sum()
    assert entropy == pytest.approx([np.log(3), 0.0, -(weights * np.log(weights)).sum()], abs=1e-6)
    assert top == pytest.approx([1 / 3, 1.0, weights[0]])


def test_uniform_mixtures_have_the_width_k_and_single_tokens_the_width_1():
    uniform, single = np.zeros((2, 3), np.float32), np.array([[40.0, 0, 0]] * 2, np.float32)
    ids, logs = np.zeros((2, 3), np.int32), np.zeros((2, 3), np.float32)
    steps = {"latent_ids": ids, "latent_log_probs": logs}
    assert rollout_metrics(rows({"latent_scores": uniform, **steps}))["latent/effective_width"] == pytest.approx(3.0)
    assert rollout_metrics(rows({"latent_scores": single, **steps}))["latent/effective_width"] == pytest.approx(1.0)


def test_shares_count_rows():
    none, floats = np.zeros(0, np.int32), np.zeros(0, np.float32)
    metrics = rollout_metrics(
        rows(
            {"reward": 1.0, "grade_reason": "correct", "grading_seconds": 50.0},
            {"finish_reason": "length", "hard_ids": none, "hard_log_probs": floats},
            {"grade_reason": "timeout"},
            {"reward": None, "grade_reason": "ungraded"},
            {"finish_reason": "aborted", "reward": None, "grade_reason": "ungraded"},
        )
    )
    assert metrics["rollout/reward"] == pytest.approx(1 / 3)
    assert metrics["rollout/grading_max_s"] == 50.0
    assert metrics["rollout/grading_s"] > 10.0
    assert metrics["rollout/truncated_share"] == metrics["rollout/aborted_share"] == 0.2
    assert metrics["rollout/verifier_timeout_share"] == metrics["rollout/reason_timeout"] == 0.2
    assert metrics["rollout/reason_out_of_memory"] == 0.0  # a share is there in every step, so that curves have no gaps
    assert metrics["rollout/ungraded_share"] == pytest.approx(0.4)
    assert metrics["latent/thinking_end_rate"] == pytest.approx(0.8)


def test_the_latent_share_and_where_chains_leave_latent_mode():
    """Shares are of all steps together; a row that never leaves has no exit."""
    none, floats = np.zeros(0, np.int32), np.zeros(0, np.float32)

    def row(latent, hard):
        steps = {name: np.zeros((latent, 3), np.float32) for name in ("latent_scores", "latent_log_probs")}
        hard_steps = {"hard_ids": np.ones(hard, np.int32), "hard_log_probs": np.zeros(hard, np.float32)}
        return {"latent_ids": np.zeros((latent, 3), np.int32), **steps, **hard_steps}

    metrics = rollout_metrics(rows(row(2, 2), row(4, 6), {**row(6, 0), "hard_ids": none, "hard_log_probs": floats}))
    assert metrics["rollout/latent_share"] == pytest.approx(12 / 20)
    assert metrics["latent/exit_step"] == 3.0
    assert "latent/exit_step" not in rollout_metrics(rows({**row(6, 0), "hard_ids": none, "hard_log_probs": floats}))


def test_responses_without_latent_mode_have_no_latent_metrics():
    names = rollout_metrics(rows({}, {}, k=0))
    assert not [name for name in names if name.startswith("latent/") or name == "rollout/latent_share"]
