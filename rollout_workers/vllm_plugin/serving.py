"""Latent steps behind vLLM's own server: what an HTTP request means.

    client ──HTTP──► vLLM's server ── admission.py: status 400 for what latent draws do not know
                          │
                          ▼
                     vLLM's engine ── worker: Served.settings_of(request) ──► Decoder

A request's settings are vLLM's own fields (`temperature`, `top_p`, `top_k`, `max_tokens`, `seed`, `n`, `stop`) and, in
`vllm_xargs`, `noise`. K, tau and the rule of the exit are the model's (`latent_chain.json`): other values would be new
to it. The server has no run and no policy version; the key of a request's randomness is its seed and its prompt, as
`LatentModel`'s, or its own id if it has no seed.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from latent_grpo.common.errors import ConfigError
from latent_grpo.common.noise import trajectory_key
from latent_grpo.rollout_workers.trained_model import TrainedModel, prompt_uid

SERVING = "serving"  # the key of `additional_config` that names the served model
NOISE = "noise"  # the key of `vllm_xargs`: scale of the one-sided Gumbel noise, 0 by default


@dataclass(slots=True)
class Served:
    """The requests of a server in one of its workers; every rank numbers them alike."""

    model: TrainedModel
    _uids: dict[str, int] = field(default_factory=dict)  # by vLLM's request id
    _numbers: itertools.count[int] = field(default_factory=itertools.count)

    def settings_of(self, request: Any) -> tuple[int, dict[str, Any]]:
        """Returns (uid, settings) of a new request of the server, as `settings.request_settings` does of a rollout."""
        params, ids = request.sampling_params, request.prompt_token_ids
        if ids is None:  # a prompt of embeddings; its ids are of no use but for the key
            ids = [0] * len(request.prompt_embeds)
        if request.req_id not in self._uids:
            self._uids[request.req_id] = next(self._numbers)
        chain, defaults = self.model.chain, self.model.defaults
        noise = float((params.extra_args or {}).get(NOISE, 0.0))
        greedy = params.temperature <= 0
        return self._uids[request.req_id], {
            "careful": 1,  # an inexact draw could not be made again
            "key": _key(request.req_id, params.seed, np.asarray(ids, dtype=np.int32)),
            "budget": params.max_tokens or defaults.max_tokens,
            "k": chain.k or 1,
            "latent": int(self.model.latent),
            "noisy": int(noise > 0),
            "one_sided": 1,
            "argmax_exits": int(chain.latent_exit != "first"),
            "top_k": 1 if greedy else max(params.top_k, 0),
            "temperature": 1.0 if greedy else params.temperature,
            "top_p": params.top_p,
            "noise_scale": noise or 1.0,
            "tau": chain.tau or 1.0,
        }

    def finished(self, request_ids: Collection[str]) -> list[int]:
        """Forgets requests; returns the uids of those that were known."""
        return [self._uids.pop(name) for name in request_ids if name in self._uids]


def core_settings(model: TrainedModel, max_model_len: int) -> dict[str, Any]:
    """Returns what `settings.new_core` reads, for a served model. Raises ConfigError."""
    allowed = np.asarray(model.facts.allowed, dtype=bool)
    return {
        "vocab_size": model.facts.vocab_size,
        "forbidden_ids": np.nonzero(~allowed)[0].tolist(),
        "end_id": model.facts.latent_end_id,
        "placeholder": hidden_token(model),
        "max_tokens": min(model.defaults.max_tokens, max_model_len),
        "k": model.chain.k or 1,
    }


def hidden_token(model: TrainedModel) -> int:
    """Returns the token that vLLM sees in the place of latent steps: a special one, which its texts leave out.

    Raises ConfigError for a tokenizer without one that is neither EOS nor the end of thinking.
    """
    facts = model.facts
    taken = {*facts.eos_ids, facts.latent_end_id}
    for i in sorted(model.tokenizer.all_special_ids, reverse=True):
        if i < facts.vocab_size and i not in taken:
            return int(i)
    if not model.latent:
        return next(i for i in range(facts.vocab_size) if i not in taken)
    raise ConfigError(
        f"the tokenizer of {model.path} has no special token besides EOS and the end of thinking, which a server needs "
        "in the place of latent steps, so that its texts leave them out; add one, for example a padding token"
    )


def _key(request_id: str, seed: int | None, prompt: np.ndarray) -> int:
    """Returns the key of a request's randomness (METHOD §2.5): that of `LatentModel` for the same prompt and seed."""
    uid = f"request/{request_id}" if seed is None else prompt_uid(prompt)
    return trajectory_key(
        run_seed=seed or 0, purpose="evaluation", problem_uid=uid, epoch=0, sample_index=0, policy_version=0
    )
