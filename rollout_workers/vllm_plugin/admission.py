"""The refusal, in vLLM's server, of requests that latent steps cannot serve: in the worker it would be too late.

vLLM asks the logits processors of its settings whether they take a request's parameters, and answers the client.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from vllm.v1.sample.logits_processor import LogitsProcessor

from latent_grpo.rollout_workers.vllm_plugin.serving import NOISE

if TYPE_CHECKING:
    import torch
    from vllm import SamplingParams

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (0.0,), "frequency_penalty": (0.0,), "repetition_penalty": (1.0,), "min_p": (0.0,),
    "min_tokens": (0,), "logprobs": (None,), "prompt_logprobs": (None,), "logit_bias": (None,),
    "allowed_token_ids": (None,), "bad_words": (None, []), "structured_outputs": (None,),
    "thinking_token_budget": (None,), "repetition_detection": (None,),
}  # fmt: skip
"""Fields of a request that latent draws (METHOD §2) do not know, with the values that ask for nothing."""


class LatentRequests(LogitsProcessor):
    """Refuses, in the server, the requests that latent steps cannot serve. It processes no logits."""

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Raises ValueError, which the server answers with status 400."""
        asked = [name for name, neutral in NEUTRAL.items() if getattr(sampling_params, name, neutral[0]) not in neutral]
        if asked:
            raise ValueError(
                f"{', '.join(asked)}: this model thinks in latent steps, whose draws have no such setting; leave it out"
            )
        arguments = dict(sampling_params.extra_args or {})
        noise = arguments.pop(NOISE, 0.0)
        if arguments:
            raise ValueError(f"vllm_xargs: unknown {', '.join(sorted(arguments))}; the only key is {NOISE}")
        if isinstance(noise, (bool, str, list)) or not (math.isfinite(noise) and noise >= 0):
            raise ValueError(f"vllm_xargs.{NOISE} must be a number of 0 (off) or more, got {noise!r}")

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        pass

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        return logits

    def is_argmax_invariant(self) -> bool:
        return True

    def update_state(self, batch_update: Any) -> None:
        pass
