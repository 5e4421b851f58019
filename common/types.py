"""The types that cross the boundary between the services: frozen dataclasses of plain values and NumPy arrays.

This module imports neither torch, Ray nor the services, so every process can read a trajectory.

Example: one sample of a group, K = 3, two latent steps, then `</think>`, an answer token and EOS::

    Trajectory(latent_ids=[[5, 7, 2], [7, 5, 1]], hard_ids=[19, 4, 1], finish_reason="stop", reward=1.0, ...)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

Purpose = Literal["training", "evaluation", "self_test"]
NoiseMode = Literal["one_sided", "two_sided", "off"]
LatentExit = Literal["argmax_or_first", "first"]
"""What ends latent mode (METHOD §2.3): the latent-end token as the first selected id, or also as the argmax."""
FinishReason = Literal["stop", "length", "aborted"]
"""METHOD §2.6. `stop`: EOS was sampled; `length`: the budget ended first; `aborted`: interrupted, never graded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One row of a task: the problem and its gold answer."""

    uid: str  # task name + row index: contents repeat in real data (METHOD §2.5)
    task: str
    messages: tuple[tuple[str, str], ...]  # (role, content) of the chat; a plain problem is one user message
    answer: str
    cot: str = ""  # explicit chain of thought, where the source has one (for METHOD §7)
    solution: str = ""  # visible text after the chain, with the boxed answer; empty: the boxed answer alone (METHOD §7)
    whole: bool = False  # whether the messages are a whole prompt (verl's layout), not a problem to be put into one


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenFacts:
    """The facts of a tokenizer that the pipeline needs, resolved and checked once at start (`common.prompts`)."""

    vocab_size: int  # V: rows of the model's output, padding rows included
    allowed: np.ndarray  # [V] bool: ids that the tokenizer has; others are never sampled (METHOD §2.1)
    latent_end_id: int | None  # first token of `</think>`; None only for `grpo` with a tokenizer that lacks it
    eos_ids: tuple[int, ...]
    pad_id: int

    @property
    def latent_end(self) -> int:
        """`latent_end_id`, for code that takes latent steps. Raises ValueError for a tokenizer without one."""
        if self.latent_end_id is None:
            raise ValueError("this tokenizer has no token for the end of thinking, so it has no latent steps")
        return self.latent_end_id


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingSettings:
    """The sampling settings of one group (METHOD §2). They travel with each request, never with a batch."""

    mode: Literal["latent", "visible"]  # how the response starts; `grpo` starts (and stays) visible
    max_tokens: int  # response steps, latent and hard together
    temperature: float = 0.6  # of hard steps
    top_p: float = 0.95
    top_k: int = 30  # of hard steps
    k: int = 10  # mixture width K
    tau: float = 1.0
    noise_mode: NoiseMode = "one_sided"
    noise_scale: float = 1.0
    latent_exit: LatentExit = "argmax_or_first"


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupRequest:
    """A prompt and its requested samples: the unit of dispatch, of retry and of exactly-once delivery."""

    group_uid: str
    problem_uid: str
    task: str
    prompt_ids: np.ndarray  # [P] int32
    sample_indices: tuple[int, ...]  # (0, ..., G-1) in training
    sampling: SamplingSettings
    purpose: Purpose
    epoch: int
    run_seed: int
    verifier: str  # registered name or import path
    gold_answer: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyVersion:
    """The version of published weights: a number that rises by one with every publication, and their checksum."""

    version: int
    checksum: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectory:
    """One sample: the Arrow row of `common.schema` as NumPy arrays, with L latent steps, H hard steps and T = L + H.

    An engine fills everything but the text and the grade, which its worker adds. `reward is None` means ungraded: the
    sample never enters statistics (METHOD §4).
    """

    run_id: str = ""
    purpose: Purpose
    task: str
    problem_uid: str
    group_uid: str
    sample_index: int
    epoch: int
    run_seed: int
    policy_version_min: int
    policy_version_max: int
    worker: str = ""
    engine: str
    sampling: SamplingSettings
    prompt_ids: np.ndarray  # [P] int32
    latent_ids: np.ndarray  # [L, K] int32, descending score
    latent_scores: np.ndarray  # [L, K] float32: log p + noise
    latent_log_probs: np.ndarray  # [L, K] float32: behaviour log p at temperature 1
    hard_ids: np.ndarray  # [H] int32, from the latent-end token on
    hard_log_probs: np.ndarray  # [H] float32: log_softmax(logits / temperature)[id]
    finish_reason: FinishReason
    response_text: str = ""  # decoded hard steps without EOS
    gold_answer: str = ""
    parsed_answer: str | None = None
    reward: float | None = None
    grade_reason: str = "ungraded"
    generation_seconds: float = 0.0
    grading_seconds: float = 0.0

    @property
    def num_steps(self) -> int:
        """T, the number of response steps, latent and hard, end token and EOS included (METHOD §8's chain length)."""
        return len(self.latent_ids) + len(self.hard_ids)
