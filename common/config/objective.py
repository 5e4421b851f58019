"""The values of the keys that a run's algorithm decides where its settings do not (METHOD §9)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from latent_grpo.common.types import NoiseMode


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """Values in effect of the keys of the same names in :class:`RunConfig`, and of `noise.mode`; none is null."""

    noise_mode: NoiseMode
    component_weighting: Literal["mixture", "uniform"]
    flip: Literal["reference", "sign", "off"]
    first_token: bool
    masking: Literal["exclude", "include", "off"]
