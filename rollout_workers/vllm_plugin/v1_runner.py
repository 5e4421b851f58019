"""The decoder in vLLM's V1 model runner (the CPU build's; tested on 0.32), which wraps three of its methods.

_update_states   samples start and finish        ──► slots
_preprocess      embeddings of the batch's tokens ──► mixtures written over those of latent steps
_sample          logits of the batch's requests   ──► `Decoder.draw` instead of vLLM's own sampler
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.v1.outputs import SamplerOutput

from latent_grpo.rollout_workers.decoding import Decoder
from latent_grpo.rollout_workers.vllm_plugin.serving import Served
from latent_grpo.rollout_workers.vllm_plugin.settings import request_settings

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner
else:
    GPUModelRunner = object  # the worker adds the class that vLLM has chosen


class LatentRunner(GPUModelRunner):
    """A mixin for the runner's own class; the worker that mixes it in sets its attributes."""

    latent: Decoder
    served: Served | None  # behind vLLM's server
    slot_of: dict[str, int]  # by vLLM's request id, until the request is finished; preempted ones stay

    def _update_states(self, scheduler_output: SchedulerOutput) -> Any:
        for request_id in scheduler_output.finished_req_ids:
            self.slot_of.pop(request_id, None)
        for new in scheduler_output.scheduled_new_reqs:
            uid, settings = request_settings(new, self.served)
            prompt = new.prompt_embeds if new.prompt_token_ids is None else new.prompt_token_ids
            self.slot_of[new.req_id] = self.latent.add(uid, len(prompt), settings)
        return super()._update_states(scheduler_output)

    def _slots(self) -> np.ndarray:
        """Returns the slot of each request, [n], in the batch's order."""
        return np.array([self.slot_of[request_id] for request_id in self.input_batch.req_ids], dtype=np.int64)

    def _preprocess(
        self, scheduler_output: SchedulerOutput, num_input_tokens: int, intermediate_tensors: Any = None
    ) -> Any:
        prepared = super()._preprocess(scheduler_output, num_input_tokens, intermediate_tensors)
        n = self.input_batch.num_reqs
        places, slots = self.latent.generated_rows(
            self._slots(), self.input_batch.num_computed_tokens_cpu[:n], self.query_start_loc.np[: n + 1]
        )
        self.latent.feed(self.inputs_embeds.gpu, places, slots, self.positions, self.model.embed_input_ids)
        return prepared

    def _sample(self, logits: torch.Tensor, spec_decode_metadata: Any) -> SamplerOutput:
        n = self.input_batch.num_reqs
        last = self.query_start_loc.gpu[1 : n + 1].long() - 1
        complete = ~self.discard_request_mask.gpu[:n]
        tokens = self.latent.draw(logits, self._slots(), self.positions[last], complete).tokens
        return SamplerOutput(sampled_token_ids=tokens.to(torch.int32).unsqueeze(-1), logprobs_tensors=None)
