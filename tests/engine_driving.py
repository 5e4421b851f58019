"""What tests do with an engine, in the contract tests and on CUDA alike."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from redraw import Redraw, redraw

from latent_grpo.common.types import GroupRequest, PolicyVersion, TokenFacts, Trajectory
from latent_grpo.common.weights import checksum
from latent_grpo.rollout_workers.engine import LatentEngine, generate

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
    """The `Decoder` of a vLLM engine of one process."""
    return worker_of(engine).latent_core


def worker_of(engine: LatentEngine):
    return engine._llm.model_executor.driver_worker.worker  # vLLM's own parts have no public way to them


def scheduler_of(engine: LatentEngine):
    return engine._llm.engine_core.engine_core.scheduler  # as above


def preempted_behind(engine: LatentEngine) -> dict[tuple[str, int], int]:
    """Requests that wait because vLLM's scheduler has thrown them out of the cache: by id and how often that has
    happened to them, the tokens that had been generated."""
    waiting = [r for r in scheduler_of(engine).waiting if r.num_preemptions]
    return {(r.request_id, r.num_preemptions): r.num_tokens - r.num_prompt_tokens for r in waiting}


# --- scenarios of a vLLM engine: small on CPU, with CUDA graphs on a GPU -----------------------------------------

Start = Callable[..., LatentEngine]  # start(model, version=3, **options): an engine that holds the model


@dataclass(frozen=True)
class Check:
    """`tolerance`: of :func:`redraw.redraw`; `gap`: the largest between a recorded and a replayed log-prob."""

    facts: TokenFacts
    tolerance: float
    gap: float = math.inf

    def redrawn(
        self,
        model: torch.nn.Module,
        requests: list[GroupRequest],
        groups: Groups,
        *,
        version: int = 3,
        first: int = 0,
    ) -> Redraw:
        """All steps from `first` on drawn again; `version`: the policy's at the samples' start."""
        each = (
            redraw(model, r, t, self.facts, version=version, tolerance=self.tolerance, first=first)
            for r in requests
            for t in groups[r.group_uid]
        )
        found = sum(each, Redraw())
        largest = max(found.latent_gaps + found.hard_gaps)
        assert largest <= self.gap, f"a log-prob is {largest} from the replayed one"
        return found


def other_weights_equal_a_fresh_start(
    start: Start, old: torch.nn.Module, new: torch.nn.Module, requests: list[GroupRequest], check: Check
) -> Redraw:
    """Weights loaded into an engine that has sampled with others: its samples are those of an engine new with them."""
    engine = start(old)
    before = collect(engine, requests)
    engine.load_weights(*published(new, version=4))
    after = collect(engine, requests)
    engine.close()
    fresh = start(new, version=4)
    expected = collect(fresh, requests)
    fresh.close()
    for request in requests:
        for sample, same in zip(after[request.group_uid], expected[request.group_uid], strict=True):
            assert (sample.policy_version_min, sample.policy_version_max) == (4, 4)
            np.testing.assert_array_equal(sample.latent_ids, same.latent_ids)
            np.testing.assert_array_equal(sample.hard_ids, same.hard_ids)
            np.testing.assert_allclose(sample.latent_scores, same.latent_scores, rtol=0, atol=check.tolerance)
    changed = [a.latent_ids.tolist() != b.latent_ids.tolist() for u in before for a, b in zip(before[u], after[u])]
    assert any(changed), "the new weights change nothing, so the test shows nothing"
    return check.redrawn(new, requests, after, version=4)


def weights_in_flight(
    start: Start,
    old: torch.nn.Module,
    new: torch.nn.Module,
    requests: list[GroupRequest],
    check: Check,
    steps: int = 20,
) -> Redraw:
    """What was drawn before is kept, with its mixtures; what is drawn after follows the new weights from the start."""
    engine = start(old, in_flight_updates=True)
    groups = update_in_flight(engine, requests, steps, published(new, version=4))
    assert engine.name != "vllm" or not core_of(engine).slots, "state of finished samples is kept"
    engine.close()
    plain = start(old)
    undisturbed = collect(plain, requests)
    plain.close()
    for request in requests:
        for sample, other in zip(groups[request.group_uid], undisturbed[request.group_uid], strict=True):
            assert (sample.policy_version_min, sample.policy_version_max) == (3, 4)
            np.testing.assert_array_equal(sample.latent_ids[:steps], other.latent_ids[:steps])
    return check.redrawn(new, requests, groups, first=steps)


def crowded_out(
    engine: LatentEngine,
    model: torch.nn.Module,
    requests: list[GroupRequest],
    check: Check,
    *,
    generated: int,
) -> Redraw:
    """A cache too small for all samples: they are preempted behind `generated` steps and more, and go on."""
    groups: Groups = {}
    thrown_out: dict[tuple[str, int], int] = {}
    for request in requests:
        engine.add(request)
    while engine.pending:
        groups |= {group[0].group_uid: group for group in engine.step()}
        thrown_out = preempted_behind(engine) | thrown_out
    count = sorted(thrown_out.values())
    assert sum(steps >= generated for steps in count) >= 2, f"too little was preempted: {count}"
    assert not core_of(engine).slots, "state of finished samples is kept"
    return check.redrawn(model, requests, groups)
