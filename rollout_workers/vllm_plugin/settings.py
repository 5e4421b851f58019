"""The transport of settings to vLLM's workers: `additional_config` holds the core's, `extra_args` a sample's."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from latent_grpo.rollout_workers.requests import SETTINGS
from latent_grpo.rollout_workers.vllm_plugin.core import LatentCore

KEY = "latent_rollout"


def new_core(vllm_config: Any, device: torch.device) -> LatentCore:
    """Makes the core that the engine described in `additional_config`."""
    described = vllm_config.additional_config[KEY]
    allowed = described["forbidden_ids"]
    flags = None
    if allowed:
        flags = np.ones(described["vocab_size"], dtype=bool)
        flags[allowed] = False
    return LatentCore(
        device,
        slots=vllm_config.scheduler_config.max_num_seqs,
        steps=described["max_tokens"],
        width=described["k"],
        allowed=flags,
        end_id=described["end_id"],
        placeholder=described["placeholder"],
    )


def extra_args(uid: int, row: np.void, careful: bool) -> dict[str, Any]:
    """Returns a sample's `extra_args`.

    `row` is its `rollout_workers.requests.SETTINGS`, and `uid` the engine's number of the sample.
    """
    settings = {name: row[name].item() for name, _ in SETTINGS}
    return {KEY: {"uid": uid, "careful": int(careful), **settings}}


def request_settings(params: Any) -> tuple[int, dict[str, Any]]:
    """Returns (uid, settings) of a request. Raises ValueError for one that the engine did not send."""
    found = (params.extra_args or {}).get(KEY) if params is not None else None
    if found is None:
        raise ValueError(
            "this vLLM samples only latent rollouts, and got a request without a rollout's settings; send rollouts "
            "through VLLMEngine, and start another vLLM for ordinary requests"
        )
    settings = dict(found)
    return settings.pop("uid"), settings
