"""Stage 1 of Latent-SFT on the learner's ranks (METHOD §7b), one of its three phases at a time."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from latent_grpo.common.config import OptimizerConfig, RunConfig
from latent_grpo.learner.base_rank import RankActor
from latent_grpo.learner.group import RankGroup
from latent_grpo.learner.logprobs import calls_size
from latent_grpo.learner.sft.induction import (
    DECODER,
    ENCODER,
    InductionModule,
    InductionParts,
    Phase,
    collate,
    encoder_beside,
    label_ids,
)
from latent_grpo.learner.sft.learner import SFTPiece, plan_rows
from latent_grpo.learner.sft.rows import SFTRow
from latent_grpo.learner.zero_engine import learning_rate

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class InductionReport:
    """The report of a step on one rank: its shares of the means."""

    text_loss: float
    answer_loss: float
    anchor_distance: float
    grad_norm: float
    applied: bool
    seconds: float


@dataclass(frozen=True, slots=True)
class Counts:
    """Numbers of targets in a step over all ranks."""

    text: int
    answer: int
    slots: int


def counts_of(rows: Sequence[SFTRow], c: int) -> Counts:
    """Counts the targets of rows. The first segment of a chain is never a target, since no slot comes before it."""
    return Counts(
        text=sum(max(len(row.cot_ids) - c, 0) for row in rows),
        answer=sum(len(row.hard_ids) for row in rows),
        slots=sum(len(row.chain.ids) for row in rows),
    )


class InductionRank(RankActor):
    """A rank of stage 1. The subclass that Ray starts sets `phase`."""

    phase: Phase

    def build(self, model: PreTrainedModel) -> tuple[nn.Module, OptimizerConfig]:
        from latent_grpo.common.prompts import read_tokens

        config = self.config
        _, facts = read_tokens(config, self.model_folder)
        self.pad_id, self.slot_id = facts.pad_id, facts.latent_end
        self.chunk_tokens = calls_size(config.learner, facts.vocab_size)
        module = InductionModule(
            self.load_model(encoder_beside(self.model_folder)),
            model,
            k=config.k,
            phase=self.phase,
            allowed=label_ids(np.asarray(facts.allowed), facts.latent_end),
            chunk_tokens=self.chunk_tokens,
            gradient_checkpointing=config.learner.gradient_checkpointing,
        )
        return module, config.latent_sft.induction.optimizer

    def train_step(self, rows: list[SFTRow], step: int, total_steps: int) -> InductionReport:
        """Makes one update on `rows`, the whole step's on every rank."""
        started = time.perf_counter()
        settings = self.config.latent_sft.induction
        counts = counts_of(rows, self.config.latent_sft.compression)
        anchor = settings.anchor if self.phase == "encoder" else 0.0
        sums = np.zeros(3)
        for parts, piece in self._parts(rows):
            loss = parts.combine(counts.text, counts.answer, counts.slots, anchor) * float(piece.counts)
            self.engine.backward(loss)
            sums += _sums(parts) * float(piece.counts)
        result = self.engine.step(learning_rate(settings.optimizer, step, total_steps))
        self.engine.ensure_finite()
        return self._report(sums, counts, started, result.grad_norm, result.applied)

    @torch.no_grad()
    def judge(self, rows: list[SFTRow], shuffled: bool) -> InductionReport:
        """Computes the losses on `rows` without an update; with `shuffled` the decoder gets other rows' latents."""
        started, sums = time.perf_counter(), np.zeros(3)
        for parts, piece in self._parts(rows, shuffled):
            sums += _sums(parts) * float(piece.counts)
        counts = counts_of(rows, self.config.latent_sft.compression)
        return self._report(sums, counts, started, grad_norm=0.0, applied=True)

    def _parts(self, rows: list[SFTRow], shuffled: bool = False) -> Iterator[tuple[InductionParts, SFTPiece]]:
        """Yields (loss parts, piece) for each micro-batch of this rank; all ranks make equally many calls (ZeRO-3)."""
        c, learner = self.config.latent_sft.compression, self.config.learner
        # both sides: the chain's text and its slots, and the visible part
        plan = plan_rows(
            [len(r.prompt_ids) + len(r.cot_ids) + len(r.chain.ids) + len(r.hard_ids) for r in rows],
            self.world,
            learner.tokens_per_microbatch,
        )
        for column in zip(*plan, strict=True):
            piece: SFTPiece = column[self.rank]
            each = [counts_of([rows[i] for i in p.rows], c) for p in column]
            chunk = self.chunk_tokens
            text, answer, slots = (
                max(-(-getattr(n, name) // chunk) for n in each) for name in ("text", "answer", "slots")
            )
            batch = collate(
                [rows[i] for i in piece.rows],
                c=c,
                slot_id=self.slot_id,
                pad_id=self.pad_id,
                calls=(text, answer, slots),
                shuffled=shuffled,
            )
            yield self.engine.forward(batch.to(self.device)), piece

    def _report(
        self, sums: np.ndarray, counts: Counts, started: float, grad_norm: float, applied: bool
    ) -> InductionReport:
        text, answer, anchor = sums / np.maximum([counts.text, counts.answer, counts.slots], 1)
        return InductionReport(
            text_loss=float(text),
            answer_loss=float(answer),
            anchor_distance=float(anchor),
            grad_norm=grad_norm,
            applied=applied,
            seconds=time.perf_counter() - started,
        )

    def export(self, folder: str) -> None:
        """Writes both models in Hugging Face format, with the tokenizer."""
        parameters = dict(self.engine.full_parameters(self.config.learner.weight_bucket_bytes))
        if self.rank:
            return
        for name, prefix, source in (
            (ENCODER, "encoder.model.", encoder_beside(self.model_folder)),
            (DECODER, "decoder.", self.model_folder),
        ):
            own = {n.removeprefix(prefix): p for n, p in parameters.items() if n.startswith(prefix)}
            self.write_model(own, source, Path(folder, name))


def _sums(parts: InductionParts) -> np.ndarray:
    return np.array([float(s.detach()) for s in (parts.text_sum, parts.answer_sum, parts.anchor_sum)])


class EncoderRank(InductionRank):
    phase = "encoder"


class DecoderRank(InductionRank):
    phase = "decoder"


class UnionRank(InductionRank):
    phase = "union"


RANKS: dict[Phase, type[InductionRank]] = {"encoder": EncoderRank, "decoder": DecoderRank, "union": UnionRank}


class InductionLearner(RankGroup):
    """The ranks of one phase of stage 1. `model_folder` is the initial model, or the last phase's decoder."""

    def __init__(self, config: RunConfig, model_folder: str | Path, phase: Phase, places: Sequence[Any] = ()):
        super().__init__(RANKS[phase], config, model_folder, places)

    def start_step(self, rows: list[SFTRow], step: int, total_steps: int) -> None:
        self._begin("train_step", self._put(rows), step, total_steps)

    def finish_step(self) -> dict[str, float]:
        """Waits for the step and returns its metrics."""
        return _summed(self._finish())

    def judge(self, rows: list[SFTRow], shuffled: bool = False) -> dict[str, float]:
        return _summed(self._all("judge", self._put(rows), shuffled))


def _summed(reports: list[InductionReport]) -> dict[str, float]:
    return {
        **{n: sum(getattr(r, n) for r in reports) for n in ("text_loss", "answer_loss", "anchor_distance")},
        "grad_norm": reports[0].grad_norm,
        "skipped_updates": float(not reports[0].applied),
        "seconds": max(r.seconds for r in reports),
    }
