"""The common parts of `latent-grpo bench rollout`: the model, the work, and a row made from two timings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from latent_grpo.common.types import GroupRequest, NoiseMode, PolicyVersion, SamplingSettings, TokenFacts, Trajectory
from latent_grpo.common.weights import checksum
from latent_grpo.deploy.bench.timing import Timing
from latent_grpo.rollout_workers.engine import LatentEngine, generate

END_ID, PAD_ID = 1, 0
TEMPERATURE, TOP_P, TOP_K = 0.6, 0.95, 30
RESPONSE = 64
LOGIT_SPREAD = 3.6


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Prompts [n, P] of one length, `samples` of each, and the length of each sample."""

    name: str
    prompts: np.ndarray
    samples: int
    lengths: np.ndarray  # [n] response steps, the same for a prompt's samples

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum()) * self.samples

    @property
    def rows(self) -> int:
        return len(self.prompts) * self.samples


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the result."""

    what: str
    rates: tuple[float, float]  # tokens a CPU second: the first named, the second named
    ratio: float  # of the first to the second, neighbouring repeats compared
    goal: str


def bench_model(vocabulary: int, hidden: int, layers: int, *, positions: int = 1024) -> PreTrainedModel:
    """Makes a random Llama whose head is scaled so that its logits spread as a trained model's do.

    Nearly flat logits, as a plain random model has them, are the sampler's worst case and not usual for a model.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=max(hidden // 32, 1),
        head_dim=32,
        max_position_embeddings=positions,
        initializer_range=0.08,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=PAD_ID,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(LOGIT_SPREAD / (config.initializer_range * hidden**0.5))
    return model


def facts_of(model: PreTrainedModel) -> TokenFacts:
    """Returns token facts without an end of text.

    The latent-end token is not allowed either, so latent rows stay latent until their budget ends.
    """
    allowed = np.ones(model.config.vocab_size, dtype=bool)
    allowed[[PAD_ID, END_ID]] = False
    return TokenFacts(vocab_size=len(allowed), allowed=allowed, latent_end_id=END_ID, eos_ids=(), pad_id=PAD_ID)


def load_own_weights(engine: LatentEngine, model: PreTrainedModel) -> None:
    tensors = [(name, p.detach().clone()) for name, p in model.named_parameters()]
    engine.load_weights(PolicyVersion(version=0, checksum=checksum(tensors)), tensors)


def requests_of(
    work: Workload, mode: Literal["latent", "visible"], k: int, noise_mode: NoiseMode = "one_sided"
) -> list[GroupRequest]:
    return [
        GroupRequest(
            group_uid=str(i),
            problem_uid=f"bench/{i}",
            task="bench",
            prompt_ids=prompt,
            sample_indices=tuple(range(work.samples)),
            sampling=SamplingSettings(
                mode=mode, max_tokens=int(length), temperature=TEMPERATURE, top_p=TOP_P, top_k=TOP_K, k=k,
                noise_mode=noise_mode,
            ),
            purpose="training",
            epoch=0,
            run_seed=0,
            verifier="number",
            gold_answer="",
        )
        for i, (prompt, length) in enumerate(zip(work.prompts, work.lengths, strict=True))
    ]  # fmt: skip


def random_trajectory(
    draw: np.random.Generator,
    prompt_ids: np.ndarray,
    *,
    latents: int,
    hard: int,
    k: int,
    vocabulary: int,
    group: int,
    sample: int,
) -> Trajectory:
    """Makes a sample of a prompt [P] with random ids of the `vocabulary`: latent steps, then hard ones."""
    scores = -np.sort(draw.exponential(2.0, (latents, k)).astype(np.float32), axis=1)
    return Trajectory(
        run_id="bench",
        purpose="training",
        task="bench",
        problem_uid=f"bench/{group}",
        group_uid=str(group),
        sample_index=sample,
        epoch=0,
        run_seed=0,
        policy_version_min=0,
        policy_version_max=0,
        worker="bench",
        engine="transformers",
        sampling=SamplingSettings(mode="latent", max_tokens=latents + hard, k=k),
        prompt_ids=prompt_ids.astype(np.int32),
        latent_ids=draw.integers(1, vocabulary, (latents, k)).astype(np.int32),
        latent_scores=scores,
        latent_log_probs=scores,
        hard_ids=draw.integers(1, vocabulary, hard).astype(np.int32),
        hard_log_probs=np.zeros(hard, dtype=np.float32),
        finish_reason="stop",
        reward=0.0,
        grade_reason="wrong",
    )


def run_engine(engine: LatentEngine, requests: list[GroupRequest]) -> float:
    return float(sum(t.num_steps for group in generate(engine, requests) for t in group))


def compared(what: str, first: Timing, second: Timing, goal: str) -> Row:
    return Row(what=what, rates=(first.per_second, second.per_second), ratio=first.ratio_to(second), goal=goal)
