"""Where the tests of this folder run: on the GPU, or, to try the same code without one, on the CPU.

`LATENT_GRPO_GPU_TESTS_ON=cpu pytest tests/gpu` runs on the CPU what does not need CUDA itself.
"""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def shares(device) -> dict[str, float]:
    """`num_gpus` of a rollout worker and a learner rank that live on one GPU."""
    return {"rollout": 0.4, "learner": 0.5} if device.type == "cuda" else {"rollout": 0.0, "learner": 0.0}


@pytest.fixture
def cuda(device) -> torch.device:
    """For what only a GPU has: its memory, its products, its synchronisation."""
    if device.type != "cuda":
        pytest.skip("is about CUDA itself")
    return device
