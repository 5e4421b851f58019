"""How a rollout worker of a run is made, inside its actor."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from common.config import RunConfig
from common.types import FinishReason
from deploy.verifiers import verifier_pool
from rollout_workers.worker import RolloutWorker


@dataclass(frozen=True, slots=True)
class WorkerFactory:
    """Picklable: settings and places only. `model`: a folder or hub id that every node can read."""

    config_json: str
    model: str
    run_id: str

    def __call__(self, name: str) -> RolloutWorker:
        import torch

        from common.models import load_model, load_tokenizer, output_facts
        from common.prompts import resolve_tokens
        from rollout_workers.transformers_engine import TransformersEngine

        config = RunConfig.model_validate_json(self.config_json)
        rollout = config.rollout
        torch.set_num_threads(rollout.resources.threads)
        tokenizer = load_tokenizer(self.model)
        vocab_size, eos_ids = output_facts(self.model)
        facts = resolve_tokens(tokenizer, vocab_size, config.latent, config.model.prompt.think_end, eos_ids)
        device = rollout.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        engine = TransformersEngine(
            load_model(self.model, config.model.dtype),
            facts,
            max_rows=rollout.max_rows,
            deterministic=config.deterministic,
            device=device,
        )
        return RolloutWorker(
            name,
            engine,
            verifier_pool(config),
            ResponseText(tokenizer, facts.eos_ids),
            k=config.schema_k,
            run_id=self.run_id,
        )


@dataclass(frozen=True, slots=True)
class ResponseText:
    """Hard ids to the text that is graded (METHOD §1): everything but the EOS that ended it."""

    tokenizer: object
    eos_ids: tuple[int, ...]

    def __call__(self, hard_ids: np.ndarray, finish_reason: FinishReason) -> str:
        ids = hard_ids[:-1] if finish_reason == "stop" and len(hard_ids) and hard_ids[-1] in self.eos_ids else hard_ids
        return self.tokenizer.decode(ids.tolist(), skip_special_tokens=False)
