"""What tests do with an engine, in the contract tests and on CUDA alike."""

from __future__ import annotations

import torch

from common.types import GroupRequest, PolicyVersion, Trajectory
from common.weights import checksum
from rollout_workers.engine import LatentEngine, generate

Groups = dict[str, tuple[Trajectory, ...]]  # by group_uid


def published(model: torch.nn.Module, version: int = 3) -> tuple[PolicyVersion, list[tuple[str, torch.Tensor]]]:
    """A publication of the model's weights, as `load_weights` takes it."""
    tensors = [(name, p.detach().to("cpu", copy=True)) for name, p in model.named_parameters()]
    return PolicyVersion(version=version, checksum=checksum(tensors)), tensors


def collect(engine: LatentEngine, requests: list[GroupRequest]) -> Groups:
    return {group[0].group_uid: group for group in generate(engine, requests)}


def collect_pending(engine: LatentEngine) -> Groups:
    found = {}
    while engine.pending:
        found |= {group[0].group_uid: group for group in engine.step()}
    return found


def update_in_flight(engine: LatentEngine, requests: list[GroupRequest], steps: int, publication: tuple) -> Groups:
    """Groups whose samples get other weights after so many steps."""
    for request in requests:
        engine.add(request)
    for _ in range(steps):
        engine.step()
    assert engine.pending == sum(len(r.sample_indices) for r in requests), "a sample ended before the update"
    engine.load_weights(*publication)
    return collect_pending(engine)


def core_of(engine: LatentEngine):
    """The `LatentCore` of a vLLM engine of one process."""
    return worker_of(engine).latent_core


def worker_of(engine: LatentEngine):
    return engine._llm.model_executor.driver_worker.worker


def scheduler_of(engine: LatentEngine):
    return engine._llm.engine_core.engine_core.scheduler


def preemptions(engine: LatentEngine, monkeypatch) -> list[int]:
    """Generated tokens of each request that vLLM's scheduler throws out of the cache from now on."""
    scheduler, count = scheduler_of(engine), []
    original = scheduler._preempt_request

    def counted(request, *args, **kwargs):
        count.append(request.num_tokens - request.num_prompt_tokens)
        return original(request, *args, **kwargs)

    monkeypatch.setattr(scheduler, "_preempt_request", counted)
    return count
