"""The transport of settings to vLLM's workers: `additional_config` holds the core's, `extra_args` a sample's.

Behind vLLM's server `additional_config` names the model, and `serving.py` makes both of it and of the requests.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from latent_grpo.common.errors import ConfigError
from latent_grpo.rollout_workers.decoding import Decoder
from latent_grpo.rollout_workers.requests import SETTINGS
from latent_grpo.rollout_workers.trained_model import read_trained_model
from latent_grpo.rollout_workers.vllm_plugin.serving import SERVING, Served, core_settings

KEY = "latent_rollout"


def served(vllm_config: Any) -> Served | None:
    """Returns the state of a server's worker; None for an engine of rollouts. Raises ConfigError."""
    model = vllm_config.additional_config[KEY].get(SERVING)
    if model is None:
        return None
    if vllm_config.cache_config.enable_prefix_caching:
        raise ConfigError(
            "latent steps behind vLLM's server need --no-enable-prefix-caching, since histories of latent steps look "
            "alike; `latent-grpo serve` gives it"
        )
    return Served(read_trained_model(model))


def new_core(vllm_config: Any, device: torch.device, served: Served | None = None) -> Decoder:
    """Makes the core that the engine described in `additional_config`, or that of a server."""
    described = vllm_config.additional_config[KEY]
    if served is not None:
        described = core_settings(served.model, vllm_config.model_config.max_model_len)
    allowed = described["forbidden_ids"]
    flags = None
    if allowed:
        flags = np.ones(described["vocab_size"], dtype=bool)
        flags[allowed] = False
    return Decoder(
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


def request_settings(request: Any, served: Served | None) -> tuple[int, dict[str, Any]]:
    """Returns (uid, settings) of a new request. Raises ValueError for one that the engine did not send."""
    if served is not None:
        return served.settings_of(request)
    params = request.sampling_params
    found = (params.extra_args or {}).get(KEY) if params is not None else None
    if found is None:
        raise ValueError(
            "this vLLM samples only latent rollouts, and got a request without a rollout's settings; send rollouts "
            "through VLLMEngine, and start vLLM's server with `latent-grpo serve`"
        )
    settings = dict(found)
    return settings.pop("uid"), settings
