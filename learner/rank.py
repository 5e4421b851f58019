"""One rank of the learner, which computes a step of the method on a batch (METHOD §3-§6).

It is a plain class; `learner.learner` puts it into a Ray actor.

    replay without gradient ──► old log-probs ──► all ranks: mean per row ──► advantages, first-token winners
                                                                                     │
    per mini-batch:  forward, backward per micro-batch ──► one optimizer update  ◄───┘

Every rank is given the whole batch and computes advantages and the plan for all of it; it replays its own rows only.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import torch
from torch import nn

from latent_grpo.common.config import LoRAConfig, OptimizerConfig
from latent_grpo.common.density import Flip
from latent_grpo.common.prompts import read_tokens
from latent_grpo.common.schema import TrajectoryBatch
from latent_grpo.learner.advantages import first_token_mask, group_advantages
from latent_grpo.learner.base_rank import RankActor
from latent_grpo.learner.batching import MiniBatch, ReplayInputs, Sharing, collate, group_indices, plan
from latent_grpo.learner.centering import OtherDraws, Redraw, draw_keys
from latent_grpo.learner.cost import ModelFlops, StepCost, peak_flops
from latent_grpo.learner.gaps import RankGaps, compare, joined
from latent_grpo.learner.logprobs import chunk_size, step_log_probs
from latent_grpo.learner.lora import without_additions
from latent_grpo.learner.objective import clip_codes, importance_weights, k3_kl, policy_loss
from latent_grpo.learner.policy import PolicyModule
from latent_grpo.learner.recorder import StepCollector, flip_shares
from latent_grpo.learner.zero_engine import ShardedModule, learning_rate

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)


STEP_KINDS = ("latent", "leaving", "visible")
"""Kinds of response steps: latent ones, the end of latent mode behind them, and text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateReport:
    """The report of one optimizer update; sums are this rank's share of the update's."""

    loss: float
    kl: float
    grad_norm: float  # of all ranks
    applied: bool
    bad_in_a_row: int  # not applied, up to and with this one
    clipped_low: int
    clipped_high: int
    clipped_dual: int
    ratios: np.ndarray  # [counted steps of the rank] float32
    flip_shares: np.ndarray  # [latent steps of the rank with a negative advantage] float32
    bad_rows: tuple[int, ...]  # of the batch: a log-prob of theirs is not a number


@dataclass(frozen=True, slots=True, kw_only=True)
class RankReport:
    """A rank's report of a step. The first three fields cover the whole batch and are equal on all ranks."""

    advantages: np.ndarray  # [B] float32
    mean_old_log_probs: np.ndarray  # [B] float64
    first_token: np.ndarray  # [B] bool: keeps its advantage at the first step
    updates: tuple[UpdateReport, ...]
    drift: np.ndarray  # [steps of the rank] float32: |log pi_old - log pi_behaviour| (METHOD §6)
    kinds: np.ndarray  # [steps of the rank] int8: index in STEP_KINDS
    importance: np.ndarray  # [steps of the rank] float32: weights; empty without
    latent_gap: np.ndarray  # [latent steps of the rank * K] float32: the same of single components' log-probs
    hard_gap: np.ndarray  # [hard steps of the rank] float32
    latent_mass: np.ndarray  # [latent steps of the rank] float32: probability of the K components together
    uncentered: np.ndarray  # [latent steps of the rank] float32: 1 where no other draw stayed; empty without centering
    hard_log_probs: np.ndarray  # [hard steps of the rank] float32
    learning_rate: float
    seconds: float
    tokens: int  # of the batch's prompts and responses
    cost: StepCost
    peak: float | None  # FLOPs a second of the rank's device at most, if known
    records: pa.RecordBatch | None  # step columns of the rank's rows (`learner.recorder`), if requested


@dataclass(slots=True)
class _Replayed:
    """A micro-batch with the values that are constant during the step."""

    inputs: ReplayInputs
    old: torch.Tensor  # [N] log pi_old, of which the ratio is taken
    plain_old: torch.Tensor  # [N] the same without centering
    others: OtherDraws | None = None
    reference: torch.Tensor | None = None  # [N] log pi of the initial model (METHOD §5)
    importance: torch.Tensor | None = None  # [N] weight (METHOD §6)
    gap: torch.Tensor | None = None  # [N, W] |log p_old - log p_behaviour| of the components; None: not computed (yet)
    drift: torch.Tensor | None = None  # [N] the same of log pi


class LearnerRank(RankActor):
    """A rank that trains the policy with the method's objective."""

    reference: PolicyModule | ShardedModule | None  # the initial model, where its own copy is needed

    @property
    def lora(self) -> LoRAConfig | None:
        return self.config.lora

    def build(self, model: PreTrainedModel) -> tuple[nn.Module, OptimizerConfig]:
        config = self.config
        self.reference = None
        if config.kl_coefficient > 0 and self.lora is None:
            self.reference = self._initial_model()
        self.facts = read_tokens(config, self.model_folder)[1] if config.centering_draws else None
        share = config.learner.share_prompts
        self.sharing = None
        if (self.device == "cpu") if share == "auto" else share:
            self.sharing = Sharing(token_in_pairs=6 * model.config.hidden_size)
        self.choose_trained(model)
        self.peak = peak_flops(self.device)
        module = PolicyModule(
            model,
            freeze_embeddings=config.freeze_embeddings and self.lora is None,  # which freezes all of the model
            gradient_checkpointing=config.learner.gradient_checkpointing,
        )
        self.flops, self.module = ModelFlops.of(model), module
        self.chunk_tokens = chunk_size(config.learner, model.config.get_text_config().vocab_size)
        return module, config.optimizer

    def _initial_model(self) -> PolicyModule | ShardedModule:
        """The initial model for the KL term: whole on each rank, and with ZeRO-3 shared among them."""
        frozen, dtype = PolicyModule(self.load_model(self.model_folder)), self.config.model.dtype
        if self.stored is None:
            return frozen.to(self.device, getattr(torch, dtype)).requires_grad_(False)
        return ShardedModule(frozen, self.config.learner, dtype, self.device, self.stored)

    # -- the step

    def train_step(self, batch: pa.RecordBatch, step: int, record: bool = False) -> RankReport:
        """Makes all updates of one step of the run on `batch` (rows in prompt order, then sample order).

        With `record` the report also has a record of each response step.
        """
        started = time.perf_counter()
        collector = StepCollector() if record else None
        view = TrajectoryBatch(batch)
        groups = group_indices(view.strings("group_uid"))
        graded = ~np.isnan(view.rewards) & np.array([r != "aborted" for r in view.strings("finish_reason")], dtype=bool)
        minibatches = self._plan(view, groups, self.config.minibatch_prompts)
        redrawn, cost = self._redrawn(view), self._planned_cost(view, minibatches)
        with cost.of("replay"):
            if self.config.old_log_probs == "behaviour":
                replayed = [[self._recorded(inputs) for inputs in self._inputs(view, mini)] for mini in minibatches]
            else:
                replayed = [
                    [self._replay(inputs, redrawn(inputs)) for inputs in self._inputs(view, mini)]
                    for mini in minibatches
                ]
        pieces = [piece for mini in replayed for piece in mini]
        mean_old = self._row_means(pieces, view.num_steps)
        advantages = group_advantages(
            view.rewards,
            groups,
            view.valid,
            graded=graded,
            masking=self.config.objective.masking,
            scale_by_std=self.config.scale_by_std,
        )
        keeps_first = np.ones(len(view), dtype=bool)
        if self.config.objective.first_token:
            # a row with NaN log-probs never wins; the guard of updates catches its loss
            ranking = np.where(np.isnan(mean_old), -np.inf, mean_old)
            keeps_first = first_token_mask(advantages, groups, view.valid & graded, ranking)
        lr = learning_rate(self.config.optimizer, step, self.config.steps)
        silent = np.where(self.config.learn_exit, -1, view.num_latent_steps)  # [B] the step that leaves, if it has none
        constants = tuple(torch.from_numpy(a).to(self.device) for a in (advantages, keeps_first, graded, silent))
        updates = []
        for mini, parts in zip(minibatches, replayed, strict=True):
            rows, first = np.asarray(mini.rows), mini is minibatches[0]
            counted_steps = int(view.num_steps[rows][graded[rows]].sum())  # global: every rank has the whole batch
            updates.append(self._update(parts, constants, max(counted_steps, 1), lr, cost, collector, first))
        return RankReport(
            advantages=advantages,
            mean_old_log_probs=mean_old,
            first_token=keeps_first,
            updates=tuple(updates),
            drift=joined([p.drift for p in pieces if p.drift is not None]),
            kinds=np.concatenate(
                [np.zeros(0, np.int8), *(_kinds(p.inputs, view) for p in pieces if p.drift is not None)]
            ),
            importance=joined([p.importance for p in pieces if p.importance is not None]),
            latent_gap=joined([p.gap[p.inputs.latent] for p in pieces if p.gap is not None]),
            hard_gap=joined([p.gap[~p.inputs.latent, 0] for p in pieces if p.gap is not None]),
            latent_mass=joined([self._mass(p) for p in pieces]),
            uncentered=joined([~p.others.usable for p in pieces if p.others is not None]),
            hard_log_probs=joined([p.old[~p.inputs.latent] for p in pieces]),
            learning_rate=lr,
            seconds=time.perf_counter() - started,
            tokens=int(view.prompt_ids.lengths.sum() + view.num_steps.sum()),
            cost=cost,
            peak=self.peak,
            records=None if collector is None else collector.batch(),
        )

    def _update(
        self,
        parts: list[_Replayed],
        constants: tuple[torch.Tensor, ...],
        denominator: int,
        lr: float,
        cost: StepCost,
        collector: StepCollector | None,
        first: bool,
    ) -> UpdateReport:
        """Takes one optimizer step over this rank's micro-batches (METHOD §5); `first`: the step's first."""
        config, (advantages, keeps_first, graded, silent) = self.config, constants
        clips = {"clip_low": config.clip.low, "clip_high": config.clip.high, "dual_clip": config.clip.dual}
        loss_sum, kl_sum, clipped, ratios, flips, bad = 0.0, 0.0, np.zeros(3, dtype=int), [], [], set()
        for part in parts:
            inputs, rows = part.inputs, part.inputs.batch_rows
            masked = ((inputs.steps == 0) & ~keeps_first[rows]) | (inputs.steps == silent[rows])
            step_advantages = torch.where(masked, 0.0, advantages[rows])
            counted = graded[rows]
            with cost.of("forward"):
                components = self.engine.forward(inputs, None, part.others)
                log_probs = self._steps(
                    components, inputs, advantages=step_advantages, flip=config.objective.flip, others=part.others
                )
                loss, diagnostics = policy_loss(
                    log_probs,
                    part.old,
                    step_advantages,
                    counted,
                    **clips,
                    weights=part.importance,
                    denominator=denominator,
                )
                if part.reference is not None:
                    divergence = k3_kl(self._steps(components, inputs), part.reference)
                    divergence = torch.where(counted, divergence, 0.0).sum() / denominator
                    loss = loss + config.kl_coefficient * divergence
                    kl_sum += float(divergence.detach())
            with cost.of("backward"):
                self.engine.backward(loss)
            if first and part.gap is None:  # the weights are still those that the record was drawn with
                self._compare(part, components.detach())
            loss_sum += float(loss.detach())
            clipped += [int(diagnostics.clipped_low), int(diagnostics.clipped_high), int(diagnostics.clipped_dual)]
            ratio = (log_probs.detach() - part.old).exp()
            ratios.append(ratio[counted])
            flipped = flip_shares(components, inputs, step_advantages, config.objective.flip)
            flips.append(flipped[inputs.latent & (step_advantages < 0)])
            if collector is not None:
                collector.add(
                    inputs,
                    behaviour_log_probs=self._behaviour(inputs),
                    old_log_probs=part.plain_old,
                    new_log_probs=self._steps(components.detach(), inputs),
                    step_advantages=step_advantages,
                    ratios=ratio,
                    clipped=clip_codes(ratio, step_advantages, **clips),
                    flip_shares=flipped,
                )
            bad.update(rows[~torch.isfinite(log_probs.detach() + part.old)].tolist())
        with cost.of("optimizer"):
            result = self.engine.step(lr)
        return UpdateReport(
            loss=loss_sum,
            kl=kl_sum,
            grad_norm=result.grad_norm,
            applied=result.applied,
            bad_in_a_row=result.bad_in_a_row,
            clipped_low=int(clipped[0]),
            clipped_high=int(clipped[1]),
            clipped_dual=int(clipped[2]),
            ratios=joined(ratios),
            flip_shares=joined(flips),
            bad_rows=tuple(sorted(bad)),
        )

    @torch.no_grad()
    def _replay(self, inputs: ReplayInputs, redraw: Redraw | None) -> _Replayed:
        components = self.engine.forward(inputs, redraw)
        plain = self._steps(components, inputs)
        old, others = plain, None
        if redraw is not None:
            others, log_probs = redraw.draws()
            weighting = self.config.objective.component_weighting
            old = plain.masked_scatter(
                inputs.latent, others.centered(plain[inputs.latent], log_probs, weighting=weighting)
            )
        config, reference = self.config, self._reference(inputs)
        importance = importance_weights(
            plain - self._behaviour(inputs), config.importance_mode, config.importance_floor, config.importance_cap
        )
        replayed = _Replayed(inputs, old, plain, others, reference, importance)
        self._compare(replayed, components)
        return replayed

    @torch.no_grad()
    def _recorded(self, inputs: ReplayInputs) -> _Replayed:
        """Takes the record's log-probs as the old ones, without a pass of the policy."""
        behaviour = self._behaviour(inputs)
        return _Replayed(inputs, behaviour, behaviour, reference=self._reference(inputs))

    def _reference(self, inputs: ReplayInputs) -> torch.Tensor | None:
        """log pi of the initial model: [N]; None without a KL term. With LoRA it is the policy without its factors."""
        if not self.config.kl_coefficient:
            return None
        if self.reference is not None:
            return self._steps(self.reference(inputs), inputs)
        with without_additions(self.module):
            return self._steps(self.engine.forward(inputs), inputs)

    def _compare(self, part: _Replayed, components: torch.Tensor) -> None:
        """Notes how far the policy's components [N, W] are from the record's, under the weights of the rollout."""
        part.gap = (components - part.inputs.behaviour).abs()
        part.drift = (self._steps(components, part.inputs) - self._behaviour(part.inputs)).abs()

    def _redrawn(self, view: TrajectoryBatch) -> Callable[[ReplayInputs], Redraw | None]:
        """Returns a function that makes the other draws of a micro-batch of `view` (`learner.centering`)."""
        facts = self.facts
        if facts is None:
            return lambda inputs: None
        keys = draw_keys(view, self.config.centering_draws)
        return lambda inputs: Redraw(view, inputs, keys, facts)

    def _plan(self, view: TrajectoryBatch, groups: np.ndarray, minibatch_prompts: int) -> tuple[MiniBatch, ...]:
        return plan(
            view.prompt_ids.lengths,
            view.num_steps,
            groups,
            minibatch_prompts=minibatch_prompts,
            ranks=self.world,
            tokens_per_microbatch=self.config.learner.tokens_per_microbatch,
            chunk_tokens=self.chunk_tokens,
            sharing=self.sharing,
        )

    def _planned_cost(self, view: TrajectoryBatch, minibatches: tuple[MiniBatch, ...]) -> StepCost:
        """Returns the cost of this rank's passes, without the seconds that they take."""
        cost, lengths = StepCost(self.device), np.asarray(view.prompt_ids.lengths)
        num_steps = np.asarray(view.num_steps)
        for micro in (micro for mini in minibatches for micro in mini.ranks[self.rank]):
            prompts = np.array([lengths[rows[0]] for rows in micro.sequences], dtype=np.int64)
            fed = [np.maximum(num_steps[list(rows)], 1) - 1 for rows in micro.sequences]
            sizes = [int(prompt + of.sum()) for prompt, of in zip(prompts, fed, strict=True)]
            cost.real += sum(sizes)
            cost.computed += len(sizes) * max(sizes, default=0)
            steps = int(num_steps[list(micro.rows)].sum())
            forwards = (self.config.old_log_probs == "recompute") + (
                self.config.kl_coefficient > 0
            )  # besides the update's
            cost.flops += forwards * self.flops.count(prompts, fed, steps, gradient=False)
            cost.flops += self.flops.count(prompts, fed, steps, gradient=True)
        return cost

    def _inputs(self, view: TrajectoryBatch, mini: MiniBatch) -> Iterator[ReplayInputs]:
        for micro in mini.ranks[self.rank]:
            yield collate(view, micro.sequences, micro.chunks).to(self.device)

    def _steps(
        self,
        components: torch.Tensor,
        inputs: ReplayInputs,
        *,
        advantages: torch.Tensor | None = None,
        flip: Flip = "off",
        others: OtherDraws | None = None,
    ) -> torch.Tensor:
        weighting = self.config.objective.component_weighting
        return step_log_probs(components, inputs, weighting=weighting, advantages=advantages, flip=flip, others=others)

    def _behaviour(self, inputs: ReplayInputs) -> torch.Tensor:
        """log pi_behaviour of each step: [N] (METHOD §6)."""
        return self._steps(inputs.behaviour, inputs)

    def _mass(self, part: _Replayed) -> torch.Tensor:
        """Probability that the behaviour policy gave to the K components together: [latent steps]."""
        return part.inputs.behaviour[part.inputs.latent].exp().sum(-1)

    def _row_means(self, pieces: list[_Replayed], num_steps: np.ndarray) -> np.ndarray:
        """Mean old log-prob over the response steps of every row of the batch, on every rank: [B] (METHOD §4.2)."""
        sums = torch.zeros(len(num_steps), dtype=torch.float64)
        for piece in pieces:
            sums.index_add_(0, piece.inputs.batch_rows.cpu(), piece.plain_old.double().cpu())
        sums = sums.to(self.device)
        torch.distributed.all_reduce(sums)  # each row lies on one rank, the others add zero
        return sums.cpu().numpy() / np.maximum(num_steps, 1)

    # -- self-test

    @torch.no_grad()
    def replay(self, batch: pa.RecordBatch) -> RankGaps:
        """Compares the learner's component log-probs with the recorded ones (METHOD §6); updates nothing."""
        view = TrajectoryBatch(batch)
        groups = group_indices(view.strings("group_uid"))
        minibatches = self._plan(view, groups, int(groups.max(initial=0)) + 1)
        return compare(self.engine.forward, (inputs for mini in minibatches for inputs in self._inputs(view, mini)))


def _kinds(inputs: ReplayInputs, view: TrajectoryBatch) -> np.ndarray:
    """Returns the index in `STEP_KINDS` of each step: [N] int8."""
    latent, steps = inputs.latent.cpu().numpy(), inputs.steps.cpu().numpy()
    latents = np.asarray(view.num_latent_steps)[inputs.batch_rows.cpu().numpy()]
    leaving = (steps == latents) & (latents > 0)
    return np.select([latent, leaving], [0, 1], default=2).astype(np.int8)
