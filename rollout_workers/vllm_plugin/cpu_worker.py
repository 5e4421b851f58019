"""The worker of vLLM's CPU build, in a module of its own, since the CUDA build cannot import that class."""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.cpu_worker import CPUWorker

from latent_grpo.rollout_workers.vllm_plugin.weights import keep_plain_weights
from latent_grpo.rollout_workers.vllm_plugin.workers import LatentWorker


class LatentCPUWorker(LatentWorker, CPUWorker):
    """A CPU worker whose weights stay as published instead of packed, so that they can be read back and updated."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        keep_plain_weights()
        super().load_model(*args, **kwargs)
