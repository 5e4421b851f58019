"""Latent-SFT on the learner's ranks (METHOD §7): the actor of a rank, and the group of ranks."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from latent_grpo.common.config import LatentSFTConfig, LoRAConfig, OptimizerConfig, RunConfig
from latent_grpo.common.types import TokenFacts
from latent_grpo.learner.base_rank import RankActor
from latent_grpo.learner.group import RankGroup
from latent_grpo.learner.logprobs import calls_size
from latent_grpo.learner.policy import load_policy_model
from latent_grpo.learner.sft.induction import InducedChains, encoder_beside
from latent_grpo.learner.sft.module import Calls, LatentSFTModule, collate, means, row_key
from latent_grpo.learner.sft.rows import SFTRow
from latent_grpo.learner.sft.soft_labels import ChainSource
from latent_grpo.learner.zero_engine import learning_rate

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class SFTReport:
    """The report of a step on one rank; the two parts of the loss are its share of the step's (METHOD §7)."""

    kl: float  # of the soft labels from the policy, mean over the step's latent positions
    cross_entropy: float  # mean over the step's hard positions
    grad_norm: float
    applied: bool
    seconds: float


@dataclass(frozen=True, slots=True)
class SFTPiece:
    """The rows of one forward pass of one rank.

    Without `counts` it repeats a row, so that all ranks make equally many passes.
    """

    rows: tuple[int, ...]
    counts: bool = True


def plan_rows(lengths: Sequence[int], ranks: int, tokens_per_microbatch: int) -> tuple[tuple[SFTPiece, ...], ...]:
    """Plans [ranks][micro-batches]: rows are dealt longest first and cut where the padded size exceeds the budget."""
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    packed = []
    for rank in range(ranks):
        pieces: list[list[int]] = []
        for row in order[rank::ranks]:
            if not pieces or (len(pieces[-1]) + 1) * lengths[pieces[-1][0]] > tokens_per_microbatch:
                pieces.append([])
            pieces[-1].append(row)
        packed.append([SFTPiece(tuple(piece)) for piece in pieces])
    count = max(len(pieces) for pieces in packed)
    filler = SFTPiece((order[-1],), counts=False)
    return tuple(tuple(pieces + [filler] * (count - len(pieces))) for pieces in packed)


def self_feeding_share(settings: LatentSFTConfig, step: int) -> float:
    """Probability of self-feeding in step `step` (from 0): rises linearly over `self_feeding_ramp` steps."""
    return settings.self_feeding * min((step + 1) / max(settings.self_feeding_ramp, 1), 1.0)


def least_calls(
    plan: Sequence[Sequence[SFTPiece]], rows: Sequence[SFTRow], chunk_tokens: int, feed: bool
) -> list[Calls]:
    """Returns, for each micro-batch, the number of output-layer calls that all ranks make in it."""

    def most(pieces: Sequence[SFTPiece], size: Callable[[SFTRow], int]) -> int:
        return max(-(-sum(size(rows[i]) for i in piece.rows) // chunk_tokens) for piece in pieces)

    return [
        Calls(
            latent=most(pieces, lambda row: len(row.chain.ids)),
            hard=most(pieces, lambda row: len(row.hard_ids)),
            feed=feed,
        )
        for pieces in zip(*plan, strict=True)
    ]


class SFTRank(RankActor):
    @property
    def lora(self) -> LoRAConfig | None:
        return self.config.latent_sft.lora

    def build(self, model: PreTrainedModel) -> tuple[nn.Module, OptimizerConfig]:
        from latent_grpo.common.prompts import read_tokens

        config, settings = self.config, self.config.latent_sft
        _, facts = read_tokens(config, self.model_folder)
        self.pad_id = facts.pad_id
        self.labels = self._chain_source(facts)
        self.choose_trained(model)
        self.chunk_tokens = calls_size(config.learner, facts.vocab_size)
        module = LatentSFTModule(
            model,
            k=config.k,
            tau=config.tau,
            perturb_scale=settings.perturb_scale,
            allowed=np.asarray(facts.allowed),
            chunk_tokens=self.chunk_tokens,
            gradient_checkpointing=config.learner.gradient_checkpointing,
        )
        return module, settings.optimizer

    def _chain_source(self, facts: TokenFacts) -> ChainSource | None:
        """The source of labels, or None for a row's own labels, which are the uniform ones."""
        config, settings = self.config, self.config.latent_sft
        if settings.source == "uniform":
            return None
        return InducedChains(
            load_policy_model(encoder_beside(self.model_folder)),
            c=settings.compression,
            k=config.k,
            latent_end_id=facts.latent_end,
            allowed=np.asarray(facts.allowed),
            pad_id=facts.pad_id,
            device=self.device,
            tokens_at_once=config.learner.tokens_per_microbatch,
        )

    def _labelled(self, rows: list[SFTRow]) -> list[SFTRow]:
        if self.labels is None:
            return rows
        chains = self.labels.chains([r.prompt_ids for r in rows], [r.cot_ids for r in rows])
        return [replace(row, chain=chain) for row, chain in zip(rows, chains, strict=True)]

    def sft_step(self, rows: list[SFTRow], step: int) -> SFTReport:
        """Makes one update on `rows`, the whole step's on every rank."""
        started = time.perf_counter()
        config, settings = self.config, self.config.latent_sft
        plan = plan_rows([len(r) for r in rows], self.world, config.learner.tokens_per_microbatch)
        latent = sum(len(r.chain.ids) for r in rows)
        hard = sum(len(r.hard_ids) for r in rows)
        self_feeding = self_feeding_share(settings, step)
        feed = latent > 0 and self_feeding > 0
        calls = least_calls(plan, rows, self.chunk_tokens, feed)
        kl = cross_entropy = 0.0
        for piece, least in zip(plan[self.rank], calls, strict=True):
            batch = collate(
                self._labelled([rows[i] for i in piece.rows]),
                [row_key(config.seed, step, i) for i in piece.rows],
                k=config.k,
                pad_id=self.pad_id,
                perturb_share=settings.perturb_share,
                self_feeding=self_feeding,
                calls=least,
            )
            of_latent, of_hard = means(self.engine.forward(batch.to(self.device)), latent, hard)
            self.engine.backward((of_latent + of_hard) * float(piece.counts))
            if piece.counts:
                kl, cross_entropy = kl + float(of_latent.detach()), cross_entropy + float(of_hard.detach())
        result = self.engine.step(learning_rate(settings.optimizer, step, settings.max_steps))
        self.engine.ensure_finite()
        return SFTReport(
            kl=kl,
            cross_entropy=cross_entropy,
            grad_norm=result.grad_norm,
            applied=result.applied,
            seconds=time.perf_counter() - started,
        )


class SFTLearner(RankGroup):
    """The ranks of a Latent-SFT; one step at a time."""

    def __init__(self, config: RunConfig, model_folder: str | Path, places: Sequence[Any] = ()):
        super().__init__(SFTRank, config, model_folder, places)

    def start_step(self, rows: list[SFTRow], step: int) -> None:
        self._begin("sft_step", self._put(rows), step)

    def finish_step(self) -> dict[str, float]:
        """Waits for the step and returns its metrics."""
        return merged(self._finish())


def merged(reports: Sequence[SFTReport]) -> dict[str, float]:
    """Returns the metrics of a step from the reports of all ranks."""
    kl, cross_entropy = sum(r.kl for r in reports), sum(r.cross_entropy for r in reports)
    return {
        "loss": kl + cross_entropy,
        "kl": kl,
        "cross_entropy": cross_entropy,
        "grad_norm": reports[0].grad_norm,
        "seconds": max(r.seconds for r in reports),
        "skipped_updates": float(not reports[0].applied),
    }
