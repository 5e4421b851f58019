"""Score centering (ours, docs/centering.md): a latent step's log-density relative to other draws of the same step.

A policy gradient does not change a state's probabilities on average over what is drawn there, because scores have mean
zero: E[grad log pi(a | s)] = 0. METHOD §3.1's surrogate is no density of what §2.1 draws, and its score has a mean:
with one-sided noise every selected component is pushed in the sign of the advantage, and a token that is selected
whatever the noise (a filler) in every sample. Here J other draws of the same step are made from the learner's own
logits before the step's first update, and the mean over those that stay latent is subtracted:

    log pi_centered = log pi(drawn) - mean_j log pi(other draw j)

Given that a step stays latent, value and gradient then have mean zero over the noise, for samples of the current policy
(`max_staleness` 0) at the first update of a step; later updates are PPO's, as without centering. Hard steps, the end of
latent mode among them, are not centered. The noise of the draws is a function of the trajectory's identity
(METHOD §2.5).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from latent_grpo.common.density import Flip, surrogate_log_prob
from latent_grpo.common.latent import latent_draws
from latent_grpo.common.noise import trajectory_key
from latent_grpo.common.schema import TrajectoryBatch
from latent_grpo.common.types import TokenFacts
from latent_grpo.learner.batching import ReplayInputs


@dataclass(frozen=True, slots=True, kw_only=True)
class OtherDraws:
    """J other draws of each of a micro-batch's L latent steps, constant in the gradient; they take 12 bytes x L J K."""

    ids: torch.Tensor  # [L, J, K] int32
    scores: torch.Tensor  # [L, J, K] float32
    weights: torch.Tensor  # [L, J, K] float32
    shares: torch.Tensor  # [L, J] float32: a draw's weight in the mean; 0 if it leaves latent mode

    @property
    def usable(self) -> torch.Tensor:
        """Whether any of a step's draws stays latent: [L] bool."""
        return (self.shares > 0).any(-1)

    def centered(
        self,
        surrogate: torch.Tensor,
        log_probs: torch.Tensor,
        *,
        weighting: str,
        advantages: torch.Tensor | None = None,
        flip: Flip = "off",
    ) -> torch.Tensor:
        """Returns log pi of the latent steps, `surrogate` [L], relative to the other draws: [L].

        `log_probs` [L, J, K] are the policy's log-probs of the ids. `advantages` [L] and `flip` turn on METHOD §3.2 for
        the other draws as for the recorded one. A step whose draws all leave latent mode keeps its value without
        gradient.
        """
        draws = surrogate_log_prob(
            log_probs.flatten(0, 1),
            self.scores.flatten(0, 1),
            advantages=None if advantages is None else advantages.repeat_interleave(self.shares.shape[1]),
            component_weights=self.weights.flatten(0, 1) if weighting == "mixture" else None,
            flip=flip,
        ).view(self.shares.shape)
        mean = torch.where(self.shares > 0, draws * self.shares, 0.0).sum(-1)
        return torch.where(self.usable, surrogate - mean, surrogate.detach())

    def widened(self, inputs: ReplayInputs) -> torch.Tensor:
        """Returns the ids of all response steps whose log-probs are needed, [N, W + J K]; hard steps repeat theirs."""
        others = inputs.selected[:, :1].repeat(1, self.ids.shape[1] * self.ids.shape[2])
        others[inputs.latent] = self.ids.flatten(1).long()
        return torch.cat([inputs.selected, others], dim=1)


class Redraw:
    """Makes the other draws of a micro-batch, in the order of its latent steps, as logits become known."""

    def __init__(self, view: TrajectoryBatch, inputs: ReplayInputs, keys: np.ndarray, facts: TokenFacts):
        """`keys` [B, J] int64 are the :func:`draw_keys` of the whole batch `view`."""
        device, latent = inputs.ids.device, inputs.latent.cpu()
        rows = inputs.batch_rows.cpu()[latent].numpy()

        def column(values: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(np.ascontiguousarray(values[rows])).to(device)

        self._k, self._end_id, self._latent = view.k, facts.latent_end, latent
        self._allowed = None if facts.allowed.all() else torch.from_numpy(facts.allowed).to(device)
        self._steps, self._keys = inputs.steps[inputs.latent], column(keys)
        self._settings = {name: column(view.numbers(f"sampling_{name}")) for name in ("top_p", "noise_scale", "tau")}
        one_sided = np.array([mode == "one_sided" for mode in view.strings("sampling_noise_mode")])
        self._settings["one_sided"] = column(one_sided)
        argmax_exits = np.array([rule == "argmax_or_first" for rule in view.strings("sampling_latent_exit")])
        self._settings["argmax_exits"] = column(argmax_exits)
        self._drawn: list[tuple[torch.Tensor, ...]] = []

    def visit(self, piece: slice, logits: torch.Tensor) -> None:
        """Draws from the logits [n, V] of the next response steps, `piece`, divided by the steps' temperatures."""
        latent = self._latent[piece]
        first = int(self._latent[: piece.start].sum())
        which = slice(first, first + int(latent.sum()))
        logits = logits[latent.to(logits.device)]
        usable = logits.logsumexp(-1).isfinite()
        if not usable.all():  # nothing can be drawn; the guard of updates sees the step's own log-prob
            logits = torch.where(usable.unsqueeze(-1), logits, 0.0)
        draws = latent_draws(
            logits,
            self._keys[which],
            self._steps[which],
            k=self._k,
            end_id=self._end_id,
            allowed=self._allowed,
            top_p=self._settings["top_p"][which],
            noise_scale=self._settings["noise_scale"][which],
            tau=self._settings["tau"][which],
            one_sided=self._settings["one_sided"][which],
            argmax_exits=self._settings["argmax_exits"][which],
        )
        stay = torch.stack([~draw.leaves & usable for draw in draws], 1).float()
        shares = stay / stay.sum(1, keepdim=True).clamp(min=1)
        ids, scores, weights, log_probs = (
            torch.stack([getattr(draw, name) for draw in draws], 1)
            for name in ("ids", "scores", "weights", "log_probs")
        )
        self._drawn.append((ids.int(), scores, weights, shares, log_probs))

    def draws(self) -> tuple[OtherDraws, torch.Tensor]:
        """Returns all draws, once every piece has been visited, and their log-probs under these logits [L, J, K]."""
        ids, scores, weights, shares, log_probs = (torch.cat(parts) for parts in zip(*self._drawn, strict=True))
        return OtherDraws(ids=ids, scores=scores, weights=weights, shares=shares), log_probs


def draw_keys(view: TrajectoryBatch, draws: int) -> np.ndarray:
    """Returns the keys of the other draws' randomness, a function of each trajectory's identity: [B, draws] int64."""
    names = ("run_seed", "problem_uid", "epoch", "sample_index", "policy_version_min")
    identities = zip(*(view.values(name) for name in names), strict=True)
    keys = [
        [
            trajectory_key(
                run_seed=seed,
                purpose=f"other draw {draw}",
                problem_uid=uid,
                epoch=epoch,
                sample_index=sample,
                policy_version=version,
            )
            for draw in range(draws)
        ]
        for seed, uid, epoch, sample, version in identities
    ]
    return np.array(keys, dtype=np.int64).reshape(len(view), draws)
