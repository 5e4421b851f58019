"""What both engines read of a request: refusals, the settings of a sample as a row, and those settings for a sampler.

A running sample is a row of a structured array on the host; engines append columns of their own to `SETTINGS`. The
same bytes lie on the device as int64 [rows, columns], so one upload carries every setting of every row.
"""

from __future__ import annotations

import numpy as np
import torch

from latent_grpo.common.noise import trajectory_key
from latent_grpo.common.types import GroupRequest, PolicyVersion, TokenFacts

REALS = ("temperature", "top_p", "noise_scale", "tau")
SETTINGS = [(name, np.int64) for name in ("key", "budget", "k", "latent", "noisy", "one_sided", "top_k")]
SETTINGS += [(name, np.float64) for name in REALS]
"""`key`: of the sample's randomness; `budget`: max_tokens; `latent`: 1 while in latent mode; the rest: its settings."""


def write_settings(rows: np.ndarray, request: GroupRequest, version: int) -> None:
    """Fills the `SETTINGS` columns of a group's rows, one per sample. `version`: the policy's (METHOD §2.5)."""
    settings = request.sampling
    rows["budget"] = settings.max_tokens
    rows["latent"], rows["noisy"] = settings.mode == "latent", settings.noise_mode != "off"
    rows["one_sided"] = settings.noise_mode == "one_sided"
    for name in ("k", "top_k", *REALS):
        rows[name] = getattr(settings, name)
    rows["key"] = [
        trajectory_key(
            run_seed=request.run_seed,
            purpose=request.purpose,
            problem_uid=request.problem_uid,
            epoch=request.epoch,
            sample_index=sample_index,
            policy_version=0 if request.purpose == "evaluation" else version,
        )
        for sample_index in request.sample_indices
    ]


def upload(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """A copy of int64 `values` on the device; on a GPU the copy does not wait for what runs there."""
    tensor = torch.tensor(values, dtype=torch.int64)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def on_device(rows: np.ndarray, device: torch.device) -> torch.Tensor:
    """The bytes of structured rows [n] as int64 [n, columns]."""
    return upload(rows.view(np.int64).reshape(len(rows), -1), device)


def refusal(
    request: GroupRequest,
    facts: TokenFacts,
    version: PolicyVersion | None,
    *,
    max_rows: int,
    max_length: int | None,
) -> str | None:
    """Why no engine could serve this group, or None. `max_length`: prompt and response together."""
    settings, prompt = request.sampling, np.asarray(request.prompt_ids)
    if version is None:
        return "the engine holds no verified weights; call load_weights first"
    if not request.sample_indices or len(request.sample_indices) > max_rows:
        return f"expected 1 to max_rows={max_rows} samples, got {len(request.sample_indices)}"
    if prompt.size == 0 or prompt.min() < 0 or prompt.max() >= facts.vocab_size:
        return f"expected prompt ids in [0, {facts.vocab_size}), got {prompt.size} ids"
    if settings.max_tokens < 1 or (max_length is not None and prompt.size + settings.max_tokens > max_length):
        return (
            f"a prompt of {prompt.size} tokens and max_tokens={settings.max_tokens} do not fit into the engine's "
            f"{max_length} positions (at most the model's max_position_embeddings); shorten the prompt or max_tokens"
        )
    if settings.temperature <= 0 or settings.tau <= 0 or settings.top_k < 1:
        return (
            f"expected temperature > 0, tau > 0 and top_k >= 1, got {settings.temperature}, {settings.tau} and "
            f"{settings.top_k}; for greedy visible steps use top_k=1"
        )
    if settings.mode == "latent":
        allowed = int(np.count_nonzero(facts.allowed))
        if facts.latent_end_id is None:
            return "latent mode needs a latent-end token and this tokenizer has none; use mode 'visible'"
        if not 1 <= settings.k <= allowed:
            return f"expected k between 1 and the {allowed} allowed ids, got {settings.k}"
    return None


class Draw:
    """What the samplers read of some rows: logits [n, V] and columns as tensors or, where all equal, as scalars."""

    def __init__(
        self, rows: np.ndarray, table: torch.Tensor, logits: torch.Tensor, index: np.ndarray | None = None
    ) -> None:
        self.logits, self._rows, self._table = logits, rows, table
        if index is not None:
            which = upload(index, logits.device)
            self.logits, self._rows, self._table = logits[which], rows[index], table[which]

    def column(self, name: str) -> torch.Tensor:
        """An integer column [n] int64."""
        return self._table[:, self._rows.dtype.names.index(name)]

    def real(self, name: str) -> torch.Tensor:
        """A real column [n] float64: a setting has the same value alone and in company."""
        return self.column(name).view(torch.float64)

    def switch(self, name: str) -> bool | torch.Tensor:
        """A column of flags: a plain boolean where all rows agree (samplers then skip what nobody needs), else [n]."""
        values = self._rows[name]
        return bool(values[0]) if (values == values[0]).all() else self.column(name).bool()

    def largest(self, name: str) -> int:
        """Of an integer column."""
        return int(self._rows[name].max())

    def setting(self, name: str) -> float | torch.Tensor:
        """A number where all rows agree (the usual case, and cheaper), else [n]."""
        values = self._rows[name]
        if (values == values[0]).all():
            return values[0].item()
        return self.real(name) if name in REALS else self.column(name)
