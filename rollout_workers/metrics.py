"""Metrics of a set of trajectories, without the learner (METHOD §8), computed from columns alone."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pyarrow as pa

from latent_grpo.common.schema import TrajectoryBatch
from latent_grpo.reward.verifier import REASONS


def rollout_metrics(rows: pa.RecordBatch) -> dict[str, float]:
    """Returns accuracy, lengths, finish and grade reasons, seconds, and :func:`latent_metrics`."""
    view = TrajectoryBatch(rows)
    rewards, count = view.rewards, len(view)
    graded = ~np.isnan(rewards)
    grades, finishes = Counter(view.strings("grade_reason")), Counter(view.strings("finish_reason"))
    metrics = {
        "rollout/reward": float(rewards[graded].mean()) if graded.any() else 0.0,
        "rollout/steps": float(view.num_steps.mean()),
        "rollout/latent_steps": float(view.num_latent_steps.mean()),
        "rollout/invalid_share": float((~view.valid).mean()),
        "rollout/truncated_share": finishes["length"] / count,
        "rollout/aborted_share": finishes["aborted"] / count,
        "rollout/ungraded_share": float((~graded).mean()),
        "rollout/verifier_timeout_share": grades["timeout"] / count,
        "rollout/samples": float(count),
        "rollout/generation_s": float(view.numbers("generation_seconds").mean()),
        "rollout/grading_s": float(view.numbers("grading_seconds").mean()),
        "rollout/grading_max_s": float(view.numbers("grading_seconds").max()),
    }
    metrics |= {f"rollout/reason_{reason}": grades[reason] / count for reason in REASONS}
    return metrics | latent_metrics(view)


def latent_metrics(view: TrajectoryBatch) -> dict[str, float]:
    """Returns how wide latent steps are, and how often and where thinking ends; nothing where no row starts latent.

    The latent share is that of all response steps together; the exit step is the mean number of latent steps before the
    latent-end token, over the rows that have one.

    Entropy is that of the executed mixture softmax(r / tau), in nats, averaged over steps; the effective width of a
    step is exp(its entropy), between 1 (one token) and K (all alike).
    """
    latent = np.array([mode == "latent" for mode in view.strings("sampling_mode")], dtype=bool)
    if not latent.any():
        return {}
    left = latent & (view.hard_ids.lengths > 0)
    metrics = {
        "latent/thinking_end_rate": float(left.sum() / latent.sum()),
        "rollout/latent_share": float(view.num_latent_steps[latent].sum() / view.num_steps[latent].sum()),
    }
    if left.any():
        metrics["latent/exit_step"] = float(view.num_latent_steps[left].mean())
    scores = view.latent_scores.values
    if len(scores):
        tau = np.repeat(view.numbers("sampling_tau"), view.num_latent_steps).astype(np.float32)
        entropy, top = mixture_entropy(scores, tau)
        metrics |= {
            "latent/entropy": float(entropy.mean()),
            "latent/effective_width": float(np.exp(entropy).mean()),
            "latent/top_weight": float(top.mean()),
        }
    return metrics


def mixture_entropy(scores: np.ndarray, tau: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns entropy (nats) and largest weight of softmax(scores / tau): `scores` [N, K], `tau` [N] -> [N], [N]."""
    logits = scores / tau[:, None]
    logits = logits - logits.max(axis=1, keepdims=True)
    weights = np.exp(logits)
    total = weights.sum(axis=1)
    entropy = np.log(total) - (weights * logits).sum(axis=1) / total
    return np.maximum(entropy, 0.0), weights.max(axis=1) / total
