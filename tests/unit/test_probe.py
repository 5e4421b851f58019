"""The masses of the last latent step, from rows, and of a unit that was given its model."""

import dataclasses
import json

import numpy as np
import pytest
from fake_run import fake_config

from latent_grpo.common.config import NewModelConfig
from latent_grpo.common.metrics import MetricsWriter
from latent_grpo.common.models import make_model, make_tokenizer, save_model
from latent_grpo.common.schema import encode
from latent_grpo.common.store import TrajectoryStore
from latent_grpo.common.types import SamplingSettings, Trajectory
from latent_grpo.deploy.reproduce.probe import last_step_masses
from latent_grpo.deploy.reproduce.results import write_result
from latent_grpo.deploy.reproduce.suite import Unit

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


def test_a_given_start_is_probed_with_its_own_tokenizer(tmp_path):
    config = NewModelConfig(hidden_size=8, num_heads=2, num_layers=1)
    tokenizer = make_tokenizer(config)
    save_model(tmp_path / "given", make_model(config, tokenizer, seed=0), tokenizer)
    seven, filler = tokenizer.convert_tokens_to_ids(["7", "="])
    folder = tmp_path / "unit"  # of a start with a path, which makes no model
    TrajectoryStore(folder / "trajectories").write(0, encode([row([[seven, filler]], [[0.6, 0.3]])], 2), "evaluation")
    figures = {"t/pass_at_1": 1.0, "t/chain_length": 4.0, "t/latent_length": 1.0}
    with MetricsWriter(folder) as metrics:
        metrics.write(0, figures, kind="evaluation")
    (folder / "summary.json").write_text(json.dumps({"after": figures}))
    settings = fake_config(k=2, model={"path": str(tmp_path / "given")})
    result = write_result(folder, Unit("latent", 0, True), settings, 1.0, {}, probe=1)
    assert [(point["step"], point["answer"]) for point in result.probe] == [(0, pytest.approx(0.6))]
    assert result.metrics["latent_share"] == 0.25
