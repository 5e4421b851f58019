"""What the Transformers engine knows of its samples on the host: those that wait, that run, and that have ended."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from latent_grpo.common.types import FinishReason
from latent_grpo.rollout_workers.decoding import Fetch
from latent_grpo.rollout_workers.requests import Download, RunningGroup

ROW = np.dtype([(name, np.int64) for name in ("uid", "slot", "prompt_len", "budget", "length", "latent")])
"""A running sample: its name and slot in the decoder, its columns of the KV cache (`length`), and whether it is in
latent mode as far as the host knows. Between two steps it has taken length - prompt_len + 1 steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Queued:
    """Samples of a group that wait for rows, by their positions in it; `careful` as in `decoding.ROW`."""

    group: RunningGroup
    places: list[int]
    careful: bool

    @property
    def first_rows(self) -> int:
        """How many rows they begin with: one if they take the same latent steps, else one each."""
        settings = self.group.settings
        alike = (settings["latent"] == 1) & (settings["noisy"] == 0)
        return 1 if alike.all() else len(self.places)

    @property
    def columns(self) -> int:
        """The number of KV columns that a sample can need."""
        return len(self.group.request.prompt_ids) + self.group.request.sampling.max_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a step did to its rows, on its way to the host: codes [n], 1 for an end of text plus 2 for a latent step."""

    rows: np.ndarray  # [n] ROW, when the step was drawn
    codes: Download
    version: int  # of the weights that drew it

    @property
    def steps(self) -> np.ndarray:
        """The steps that the rows had taken with this one: [n]."""
        return self.rows["length"] - self.rows["prompt_len"] + 1

    @property
    def over(self) -> np.ndarray:
        """Which rows ended: [n] bool."""
        return (self.codes.numpy() & 1 == 1) | (self.steps >= self.rows["budget"])

    @property
    def left(self) -> np.ndarray:
        """Which rows left latent mode: [n] bool."""
        return (self.rows["latent"] == 1) & (self.codes.numpy() & 2 == 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """Finished samples whose records are on their way to the host."""

    fetch: Fetch
    samples: list[tuple[RunningGroup, list[int], FinishReason]]
    version: int
