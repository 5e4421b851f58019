"""Whole runs on the vLLM engine: workers are Ray actors with a vLLM in each."""

import pytest
from training import tiny

from latent_grpo.common.metrics import read_metrics
from latent_grpo.common.schema import TrajectoryBatch
from latent_grpo.common.store import TrajectoryStore
from latent_grpo.deploy.train import train

pytestmark = [pytest.mark.integration, pytest.mark.vllm]
VLLM = (
    "rollout.engine=vllm",
    "rollout.workers=2",
    "rollout.vllm.kv_cache_bytes=16777216",
    "model.new.hidden_size=64",  # heads of 32
    "evaluation.at_start=false",
)


def views(folder, steps):
    store = TrajectoryStore(folder.trajectories)
    return [TrajectoryBatch(store.read(step)) for step in steps]


def test_a_run_samples_each_step_on_the_weights_of_the_last(ray_session, tmp_path):
    folder = train(tiny(f"runs_folder={tmp_path}", *VLLM), "vllm")
    for version, view in enumerate(views(folder, range(1, 4))):
        assert set(view.strings("engine")) == {"vllm"}
        assert set(view.numbers("policy_version_min")) == set(view.numbers("policy_version_max")) == {version}
    lines = list(read_metrics(folder.path))
    self_test = next(row["metrics"] for row in read_metrics(folder.path, kind="self_test"))
    assert max(self_test["latent_max"], self_test["hard_max"]) < 1e-4
    assert [row["metrics"]["learner/drift_max"] < 1e-3 for row in lines] == [True] * 3


def test_weights_in_flight_keep_a_run_going_and_its_versions_close(ray_session, tmp_path):
    options = ("rollout.in_flight_updates=true", "max_staleness=1", "steps=6", "rollout.workers=1")
    folder = train(tiny(f"runs_folder={tmp_path}", *VLLM, *options), "in-flight")
    pairs = [
        (low, high)
        for view in views(folder, range(1, 7))
        for low, high in zip(view.numbers("policy_version_min"), view.numbers("policy_version_max"), strict=True)
    ]
    assert all(low <= high <= low + 2 for low, high in pairs)
    assert max(high for _, high in pairs) >= 4, "later steps are sampled on later weights"
