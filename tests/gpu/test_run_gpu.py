"""A whole run with both services on one GPU: Latent-SFT, self-test, steps, interrupt-free resume, memory afterwards."""

from __future__ import annotations

import pytest
import torch

from latent_grpo.common.config import load_config
from latent_grpo.common.metrics import read_metrics
from latent_grpo.deploy.train import resume, train

pytestmark = [pytest.mark.gpu, pytest.mark.integration]
SHORT = (
    "steps=2", "prompts_per_step=8", "minibatch_prompts=4", "group_size=4", "self_test_groups=4", "noise.scale=1.0",
    "warm_start.max_steps=4", "warm_start.batch_size=32", "warm_start.evaluate_every=4", "warm_start.stop_at=null",
    "warm_start.evaluation_problems=8", "evaluation.tasks.0.options.size=8", "checkpoint.every=1", "rollout.workers=1",
    "dynamic_sampling=drop", "rollout.engine=auto", "optimizer.schedule=constant",
)  # fmt: skip
LEFT_BYTES = 256 * 2**20  # that a closed run may leave on the GPU, which the machine's other processes share


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_quickstart_runs_with_both_services_on_the_gpu(ray_session, device, shares, tmp_path, dtype):
    free = torch.cuda.mem_get_info()[0] if device.type == "cuda" else 0
    placed = [f"{service}.resources.num_gpus={share}" for service, share in shares.items()]
    config = load_config("quickstart", [*SHORT, *placed, f"model.dtype={dtype}", f"runs_folder={tmp_path}"])
    folder = train(config, "quickstart")
    rows = read_metrics(folder.path)
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["rollout/steps"] > 0 for row in rows)
    again = resume(folder.path, ["steps=3"])
    assert [row["step"] for row in read_metrics(again.path)] == [1, 2, 3]
    assert (again.model / "model.safetensors").is_file()
    if device.type == "cuda":
        left = free - torch.cuda.mem_get_info()[0]
        assert left < LEFT_BYTES, f"{left / 2**20:.0f} MiB of GPU memory are still taken after the run"
