"""The factory of a run's rollout workers, which makes each of them inside its actor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from latent_grpo.common.config import ConfigError, RunConfig
from latent_grpo.common.types import FinishReason, TokenFacts
from latent_grpo.rollout_workers.engine import LatentEngine
from latent_grpo.rollout_workers.engine_choice import choose_engine
from latent_grpo.rollout_workers.verifiers import verifier_pool
from latent_grpo.rollout_workers.worker import RolloutWorker

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from latent_grpo.rollout_workers.step_graphs import Capture

GPU_SHARE = 0.9  # share of a worker's part of a GPU that vLLM may use for weights, keys and values


@dataclass(frozen=True, slots=True)
class WorkerFactory:
    """Makes a worker. It is picklable, since it holds only settings and paths.

    `model` is a folder or hub id that every node can read.
    """

    config_json: str
    model: str
    run_id: str

    def __call__(self, name: str) -> RolloutWorker:
        import torch

        from latent_grpo.common.prompts import read_tokens

        config = RunConfig.model_validate_json(self.config_json)
        rollout = config.rollout
        torch.set_num_threads(rollout.resources.threads)
        tokenizer, facts = read_tokens(config, self.model)
        return RolloutWorker(
            name,
            make_engine(config, self.model, facts),
            verifier_pool(config),
            ResponseText(tokenizer, facts.eos_ids),
            k=config.schema_k,
            run_id=self.run_id,
            in_flight=rollout.in_flight_updates,
        )


def make_engine(config: RunConfig, model: str, facts: TokenFacts) -> LatentEngine:
    """Makes the engine of the run's settings; it refuses to sample before its first publication."""
    rollout = config.rollout
    if choose_engine(config).name == "vllm":
        from latent_grpo.rollout_workers.vllm_engine import VLLMEngine

        tasks = (*config.tasks, *config.evaluation.tasks)
        gpus, options = rollout.resources.num_gpus, rollout.vllm
        if options.memory_share is None and gpus:
            options = options.model_copy(update={"memory_share": GPU_SHARE * min(gpus, 1.0)})
        return VLLMEngine(
            model,
            facts,
            dtype=config.model.dtype,
            max_rows=rollout.max_rows,
            max_length=max(t.max_prompt_tokens + t.max_response_tokens for t in tasks),
            max_tokens=max(t.max_response_tokens for t in tasks),
            k=max(config.schema_k, 1),
            options=options,
            in_flight_updates=rollout.in_flight_updates,
            max_positions=config.model.max_positions,
        )
    import torch

    from latent_grpo.common.models import load_model
    from latent_grpo.rollout_workers.transformers_engine import TransformersEngine

    device = rollout.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded = load_model(model, config.model.dtype, config.model.max_positions)
    return TransformersEngine(
        loaded,
        facts,
        max_rows=rollout.max_rows,
        deterministic=config.deterministic,
        in_flight_updates=rollout.in_flight_updates,
        device=device,
        capture=_capture(rollout.compile, loaded, torch.device(device)),
    )


def _capture(choice: Literal["auto", "on", "off"], model: PreTrainedModel, device: torch.device) -> Capture | None:
    """Returns how decode steps are captured (`rollout.compile`); None: they are not.

    Raises ConfigError for `on` where it cannot be had.
    """
    from latent_grpo.rollout_workers.lean_forward import has_static_positions
    from latent_grpo.rollout_workers.step_graphs import PROVEN_ON_CUDA, capture_on_cuda

    problem = None
    if device.type != "cuda":
        problem = f"the engine's device is {device}"
    elif not has_static_positions(model):
        problem = (
            f"the rotary positions of this {type(model).__name__} depend on the longest sample, so each step waits"
        )
    if choice == "on" and problem is not None:
        raise ConfigError(f"rollout.compile=on cannot capture CUDA graphs: {problem}; set it to auto or off")
    wanted = choice == "on" or (choice == "auto" and PROVEN_ON_CUDA)
    return capture_on_cuda(device) if wanted and problem is None else None


@dataclass(frozen=True, slots=True)
class ResponseText:
    """Decodes hard ids into the text that is graded (METHOD §1), without the EOS that ended it."""

    tokenizer: PreTrainedTokenizerBase
    eos_ids: tuple[int, ...]

    def __call__(self, hard_ids: np.ndarray, finish_reason: FinishReason) -> str:
        ids = hard_ids[:-1] if finish_reason == "stop" and len(hard_ids) and hard_ids[-1] in self.eos_ids else hard_ids
        return str(self.tokenizer.decode(ids.tolist(), skip_special_tokens=False))
