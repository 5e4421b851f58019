"""The decoder in vLLM's V2 model runner (the default on CUDA; written for 0.33), through its two hooks.

    ModelState.prepare_inputs_embeds   ──► mixtures written over the embeddings of latent steps, in the persistent
                                           buffer that captured CUDA graphs read
    ModelState.custom_sampler          ──► `Decoder.draw` instead of vLLM's own sampler, outside of the graphs

Nothing here waits for the device: the host knows which rows come after their prompt, and only the device knows which of
them are latent.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.sample.output import SamplerOutput

from latent_grpo.rollout_workers.decoding import SCRATCH
from latent_grpo.rollout_workers.vllm_plugin.settings import new_core, request_settings, served

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import NewRequestData


def install(model_config: Any) -> None:
    """Makes the model's class name :class:`LatentModelState` as its state, which V2 looks for; in this process only."""
    from vllm.model_executor.model_loader.utils import get_model_architecture

    model_class, _ = get_model_architecture(model_config)
    model_class.get_model_state_cls = classmethod(lambda cls: LatentModelState)


class LatentModelState(DefaultModelState):
    """A model state with the core's own slots, since the runner reuses its indices at every preemption."""

    def __init__(self, vllm_config: VllmConfig, model: nn.Module, encoder_cache: Any, device: torch.device) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)
        self.served = served(vllm_config)
        self.core = new_core(vllm_config, device, self.served)
        self.slot_of = np.zeros(self.max_num_reqs, dtype=np.int64)  # by the runner's index of a request

    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        """Adds a new request, or one that was preempted and is scheduled again."""
        super().add_request(req_index, new_req_data)
        if self.core.warming:  # vLLM warms its kernels up with requests of its own
            self.slot_of[req_index] = SCRATCH
            return
        uid, settings = request_settings(new_req_data, self.served)
        self.slot_of[req_index] = self.core.add(uid, new_req_data.prompt_len, settings)

    def prepare_inputs_embeds(self, scheduled_encoder_inputs: Any, input_batch: Any, req_states: Any) -> torch.Tensor:
        inputs: torch.Tensor = super().prepare_inputs_embeds(scheduled_encoder_inputs, input_batch, req_states)
        places, slots = self.core.generated_rows(
            self.slot_of[input_batch.idx_mapping_np],
            input_batch.num_computed_tokens_np,
            input_batch.query_start_loc_np[: input_batch.num_reqs + 1],
        )
        self.core.feed(inputs, places, slots, input_batch.positions, self.model.embed_input_ids)
        return inputs

    def custom_sampler(self, sampler: Any) -> tuple[LatentSampler, None]:
        return LatentSampler(sampler, self), None


class LatentSampler:
    """Replaces vLLM's sampler, which still keeps the state that the runner expects of it."""

    def __init__(self, base: Any, state: LatentModelState) -> None:
        self._base, self._state = base, state

    def __getattr__(self, name: str) -> Any:
        return getattr(self._base, name)

    def __call__(self, logits: torch.Tensor, input_batch: Any) -> SamplerOutput:
        n = input_batch.num_reqs
        prefill_len = self._base.req_states.prefill_len.gpu[input_batch.idx_mapping]
        complete = input_batch.seq_lens[:n] >= prefill_len
        tokens = self._state.core.draw(
            logits,
            self._state.slot_of[input_batch.idx_mapping_np],
            input_batch.positions[input_batch.logits_indices],
            complete,
        ).tokens
        return SamplerOutput(
            sampled_token_ids=tokens.view(-1, 1),
            logprobs_tensors=None,
            num_nans=None,
            num_sampled=complete.to(torch.int32),
            num_rejected=torch.zeros_like(complete, dtype=torch.int32),
        )
