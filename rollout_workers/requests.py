"""The handling of requests in both engines: admission, a sample's settings as a row, and its trajectory at the end.

A running sample is a row of a structured array on the host; engines append columns of their own to `SETTINGS`. The
device holds the same bytes as int64 [rows, columns], so one upload carries every setting of every row.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from latent_grpo.common.noise import noise_version, trajectory_key
from latent_grpo.common.types import FinishReason, GroupRequest, PolicyVersion, TokenFacts, Trajectory
from latent_grpo.rollout_workers.engine import RequestRefused

REALS = ("temperature", "top_p", "noise_scale", "tau")
COUNTS = ("key", "budget", "k", "latent", "noisy", "one_sided", "argmax_exits", "top_k")
SETTINGS: list[tuple[str, type[np.generic]]] = [(name, np.int64) for name in COUNTS]
SETTINGS += [(name, np.float64) for name in REALS]
"""Columns of a sample. `key` is that of its randomness, `budget` its max_tokens, `latent` 1 while in latent mode."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleRecord:
    """The draws of a sample: L latent steps of K components, H hard ones (see `common.types.Trajectory`)."""

    latent_ids: np.ndarray  # [L, K] int32
    latent_scores: np.ndarray  # [L, K] float32
    latent_log_probs: np.ndarray  # [L, K] float32
    hard_ids: np.ndarray  # [H] int32
    hard_log_probs: np.ndarray  # [H] float32


@dataclass(slots=True)
class RunningGroup:
    """A request in an engine, with the trajectories of its finished samples."""

    request: GroupRequest
    settings: np.ndarray  # [G] SETTINGS, one a sample
    version: int  # policy version at admission: it is part of the noise's key and the lowest that sampled
    started: float = 0.0  # by the engine's clock, seconds
    _done: dict[int, Trajectory] = field(default_factory=dict)  # by position in request.sample_indices

    @property
    def size(self) -> int:
        """G, the number of samples."""
        return len(self.request.sample_indices)

    def finish(
        self, position: int, record: SampleRecord, reason: FinishReason, *, engine: str, version: int, now: float
    ) -> tuple[Trajectory, ...] | None:
        """Makes a finished sample's trajectory; returns all of them once the last one has finished.

        `position` is the sample's place in the request, `version` the policy version that sampled last, and `now` the
        time of the engine's clock in seconds.
        """
        request = self.request
        self._done[position] = Trajectory(
            purpose=request.purpose,
            task=request.task,
            problem_uid=request.problem_uid,
            group_uid=request.group_uid,
            sample_index=request.sample_indices[position],
            epoch=request.epoch,
            run_seed=request.run_seed,
            policy_version_min=self.version,
            policy_version_max=version,
            engine=engine,
            sampling=request.sampling,
            prompt_ids=np.asarray(request.prompt_ids, dtype=np.int32),
            latent_ids=record.latent_ids,
            latent_scores=record.latent_scores,
            latent_log_probs=record.latent_log_probs,
            hard_ids=record.hard_ids,
            hard_log_probs=record.hard_log_probs,
            finish_reason=reason,
            gold_answer=request.gold_answer,
            generation_seconds=now - self.started,
        )
        if len(self._done) < self.size:
            return None
        return tuple(self._done[i] for i in range(self.size))


def admit(
    request: GroupRequest,
    facts: TokenFacts,
    version: PolicyVersion | None,
    *,
    max_rows: int,
    max_length: int | None,
) -> RunningGroup:
    """Admits a group to an engine with these limits. Raises :class:`RequestRefused` where it can never be served.

    `version` is that of the engine's weights. `max_length` limits prompt and response together; None means no limit.
    """
    problem = _refusal(request, facts, version, max_rows=max_rows, max_length=max_length)
    if problem is not None or version is None:
        raise RequestRefused(f"group {request.group_uid!r}: {problem}")
    return RunningGroup(request, sample_settings(request, version.version), version.version)


def sample_settings(request: GroupRequest, version: int) -> np.ndarray:
    """Returns `SETTINGS` [G], one per sample. `version` is the policy version (METHOD §2.5)."""
    rows, settings = np.zeros(len(request.sample_indices), dtype=SETTINGS), request.sampling
    rows["budget"] = settings.max_tokens
    rows["latent"], rows["noisy"] = settings.mode == "latent", settings.noise_mode != "off"
    rows["one_sided"] = settings.noise_mode == "one_sided"
    rows["argmax_exits"] = settings.latent_exit == "argmax_or_first"
    for name in ("k", "top_k", *REALS):
        rows[name] = getattr(settings, name)
    rows["key"] = [
        trajectory_key(
            run_seed=request.run_seed,
            purpose=request.purpose,
            problem_uid=request.problem_uid,
            epoch=request.epoch,
            sample_index=sample_index,
            policy_version=noise_version(request.purpose, version),
        )
        for sample_index in request.sample_indices
    ]
    return rows


def upload(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """Copies int64 `values` to the device; on a GPU the copy does not wait for running work."""
    tensor = torch.tensor(values, dtype=torch.int64)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def on_device(rows: np.ndarray, device: torch.device) -> torch.Tensor:
    """Copies the bytes of structured rows [n] to the device as int64 [n, columns]."""
    return upload(rows.view(np.int64).reshape(len(rows), -1), device)


def _refusal(
    request: GroupRequest,
    facts: TokenFacts,
    version: PolicyVersion | None,
    *,
    max_rows: int,
    max_length: int | None,
) -> str | None:
    """Returns why no engine could serve this group, or None. `max_length` limits prompt and response together."""
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
    if settings.temperature <= 0 or settings.tau <= 0 or settings.top_k < 0:
        return (
            f"expected temperature > 0, tau > 0 and top_k >= 0, got {settings.temperature}, {settings.tau} and "
            f"{settings.top_k}; for greedy visible steps use top_k=1"
        )
    if settings.mode == "latent":
        allowed = int(np.count_nonzero(facts.allowed))
        if facts.latent_end_id is None:
            return "latent mode needs a latent-end token, but this tokenizer has none; use mode 'visible'"
        if not 1 <= settings.k <= allowed:
            return f"expected k between 1 and the {allowed} allowed ids, got {settings.k}"
    return None


class Download:
    """A tensor on its way to the host; on a GPU nothing waits until the values are read."""

    def __init__(self, values: torch.Tensor) -> None:
        self._event = None
        if values.device.type == "cpu":
            self._values = values
            return
        self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        self._values.copy_(values, non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record(torch.cuda.current_stream(values.device))  # the copy's, whatever device is the current one

    def numpy(self) -> np.ndarray:
        """Returns the values, once they have arrived."""
        if self._event is not None:
            self._event.synchronize()
        return self._values.numpy()


class Rows:
    """The settings of a step's rows as samplers take them: plain where all rows agree (the usual case, and cheaper).

    `host` [n] has `SETTINGS` and what an engine adds, `table` [n, columns] the same on the device, and `slot` [n] is
    where the rows' state lies on the device. With `every_row` a sampler draws for all rows, whoever needs it.
    """

    def __init__(self, host: np.ndarray, table: torch.Tensor, slot: torch.Tensor, every_row: bool = False) -> None:
        self.host, self.table, self.slot, self.every_row = host, table, slot, every_row
        self.careful, self.begin_latent = bool(host["careful"].any()), bool(host["latent"].any())
        self._agreed: dict[str, np.generic | None] = {}
        self._part: tuple[np.ndarray, Rows] | None = None  # the last one, mostly that of the next step too

    def part(self, index: np.ndarray | None) -> Rows:
        """Returns the rows at `index`; None: all of them."""
        if index is None:
            return self
        if self._part is None or not np.array_equal(self._part[0], index):
            which = upload(index, self.slot.device)
            self._part = (index, Rows(self.host[index], self.table[which], self.slot[which]))
        return self._part[1]

    def column(self, name: str) -> torch.Tensor:
        """Returns an integer column [n] int64."""
        names = self.host.dtype.names or ()
        return self.table[:, names.index(name)]

    def real(self, name: str) -> torch.Tensor:
        """Returns a real column [n] float64, so that a setting has the same value as a scalar and in a tensor."""
        return self.column(name).view(torch.float64)

    def switch(self, name: str) -> bool | torch.Tensor:
        """Returns a column of flags: a plain boolean, or [n] bool."""
        agreed = self._value(name)
        return self.column(name).bool() if agreed is None else bool(agreed)

    def count(self, name: str) -> int | torch.Tensor:
        """Returns an integer column: a number, or [n] int64."""
        agreed = self._value(name)
        return self.column(name) if agreed is None else int(agreed)

    def setting(self, name: str) -> float | torch.Tensor:
        """Returns a real column: a number, or [n] float64."""
        agreed = self._value(name)
        return self.real(name) if agreed is None else float(agreed)

    def largest(self, name: str) -> int:
        """Returns the largest value of an integer column."""
        return int(self.host[name].max())

    @functools.cached_property
    def some_unbounded(self) -> bool:
        """Whether neither top_k nor top_p bounds the visible draw of some of the rows."""
        return bool(((self.host["top_k"] == 0) & (self.host["top_p"] >= 1.0)).any())

    @functools.cached_property
    def latent_widths(self) -> tuple[int, ...]:
        """The values of k of the rows in latent mode, each once."""
        return tuple(np.unique(self.host["k"][self.host["latent"] == 1]).tolist())

    @functools.cached_property
    def decisions(self) -> tuple[object, ...]:
        """What a step's code decides by these rows: steps of rows with the same have the same tensor operations.

        `careful` rows are another matter: the code decides by what the device says.
        """
        plain = [self._value(name) for name in (*REALS, "noisy", "one_sided", "argmax_exits", "top_k")]
        return (len(self.host), self.latent_widths, self.largest("top_k"), self.some_unbounded, *plain)

    def _value(self, name: str) -> Any:
        """Returns the value of which all rows agree, None where they do not."""
        if name not in self._agreed:
            values = self.host[name]
            self._agreed[name] = values[0] if (values == values[0]).all() else None
        return self._agreed[name]
