"""A record against METHOD §2, step by step on its own history (teacher-forced), on any device and in any precision.

Transformers replays what the record says was fed; the samplers draw every step again with the record's key. Numbers of
two engines differ, so a step may differ where that decides: `tolerance` is how far two log-probs of a step may move
against each other (in visible steps before the temperature). A recorded step is explained if it is what the samplers
would draw for some such movement; anything else fails. The noise itself is no matter of precision: recorded scores
minus recorded log-probs must be it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from latent_grpo.common.latent import latent_step, mix_embeddings, mixture_weights, visible_step
from latent_grpo.common.noise import GUMBEL_HIGH, GUMBEL_LOW, gumbel_noise, noise_version, trajectory_key
from latent_grpo.common.types import GroupRequest, TokenFacts, Trajectory

NOISE_ROUNDING = 1e-4  # score and log-prob are float32 of some tens


@dataclass(frozen=True)
class Redraw:
    """Of one record or (`+`) of many."""

    steps: int = 0
    alike: int = 0  # steps that are drawn again with the very ids; the others are near-ties
    latent_gaps: tuple[float, ...] = ()  # |recorded - replayed| log-prob of each component
    hard_gaps: tuple[float, ...] = ()  # and of each hard step

    def __add__(self, other: Redraw) -> Redraw:
        return Redraw(
            self.steps + other.steps,
            self.alike + other.alike,
            self.latent_gaps + other.latent_gaps,
            self.hard_gaps + other.hard_gaps,
        )


@torch.no_grad()
def redraw(
    model: torch.nn.Module,
    request: GroupRequest,
    sample: Trajectory,
    facts: TokenFacts,
    *,
    version: int,
    tolerance: float,
    first: int = 0,
) -> Redraw:
    """Draws a record's steps from `first` on again; `version`: the policy's at its start.

    Raises AssertionError for a step that no near-tie explains, and for an end that METHOD §2.3, §2.4, §2.6 do not know.
    """
    s, device = request.sampling, model.get_input_embeddings().weight.device
    logits, latent = replayed_logits(model, sample), len(sample.latent_ids)
    allowed = torch.from_numpy(np.asarray(facts.allowed, dtype=bool)).to(device)
    in_latent = latent + (1 if s.mode == "latent" and len(sample.hard_ids) else 0)
    key = trajectory_key(
        run_seed=request.run_seed,
        purpose=request.purpose,
        problem_uid=request.problem_uid,
        epoch=request.epoch,
        sample_index=sample.sample_index,
        policy_version=noise_version(request.purpose, version),
    )
    steps = torch.arange(sample.num_steps, device=device)
    parts = [
        (latent_redraw, steps[first:in_latent]),
        (visible_redraw, steps[max(first, in_latent) :]),
    ]
    found = Redraw()
    for check, at in parts:
        if len(at):
            keys = torch.full_like(at, key)
            found += check(logits[at], keys, at, sample, facts, allowed, tolerance)
    ends = [int(i) in facts.eos_ids for i in sample.hard_ids[in_latent - latent :]]
    stop = sample.finish_reason == "stop"
    assert ends == [False] * (len(ends) - 1) + [stop] * bool(ends), "EOS ends a sample, and nothing else does"
    assert stop or sample.num_steps == s.max_tokens, "a sample ended for no reason"
    return found


def replayed_logits(model: torch.nn.Module, sample: Trajectory) -> torch.Tensor:
    """[steps, V] float32: what Transformers says at each response step after the record's own history."""
    embed = model.get_input_embeddings().weight

    def rows(ids: np.ndarray) -> torch.Tensor:
        return embed[torch.from_numpy(ids.astype(np.int64)).to(embed.device)]

    fed = [rows(sample.prompt_ids), rows(sample.hard_ids)]
    if len(sample.latent_ids):
        weights = mixture_weights(torch.from_numpy(sample.latent_scores).to(embed.device), sample.sampling.tau)
        fed.insert(1, mix_embeddings(rows(sample.latent_ids), weights))
    inputs = torch.cat(fed)[None, : len(sample.prompt_ids) + sample.num_steps - 1]
    return model(inputs_embeds=inputs).logits[0, len(sample.prompt_ids) - 1 :].float()


def latent_redraw(logits, keys, steps, sample, facts, allowed, tolerance) -> Redraw:
    """Steps in latent mode, the one that leaves it included. `logits` [n, V], `keys` and `steps` [n]."""
    s, end = sample.sampling, facts.latent_end_id
    noisy, one_sided = s.noise_mode != "off", s.noise_mode == "one_sided"
    argmax_exits = s.latent_exit == "argmax_or_first"
    drawn = latent_step(
        logits, keys, steps, k=s.k, top_p=s.top_p, noise_scale=s.noise_scale, tau=s.tau, noisy=noisy,
        one_sided=one_sided, end_id=end, argmax_exits=argmax_exits, allowed=allowed,
    )  # fmt: skip
    every = torch.arange(logits.shape[-1], device=logits.device).expand(len(logits), -1)
    whole = logits.log_softmax(-1)
    log_p = whole.masked_fill(~allowed, -torch.inf)
    noise = torch.zeros_like(log_p)
    possible = certain = allowed.expand_as(log_p)
    if noisy:
        shift = -GUMBEL_LOW if one_sided else 0.0
        noise = (gumbel_noise(keys, steps, every).clamp(GUMBEL_LOW, GUMBEL_HIGH) + shift) * s.noise_scale
        possible, certain = nucleus(log_p, s.top_p, tolerance, at_least=s.k)
    score = log_p + noise
    others = log_p.index_fill(-1, torch.tensor([end], device=logits.device), -torch.inf)
    end_over_others = log_p[:, end] - others.max(-1).values

    ahead = tolerance if argmax_exits else math.inf  # how far the end may lead the others without ending latent mode

    stay = (steps < len(sample.latent_ids)).cpu()
    stayed, left = stay.nonzero()[:, 0].to(logits.device), (~stay).nonzero()[:, 0].to(logits.device)
    ids = torch.from_numpy(sample.latent_ids.astype(np.int64)).to(logits.device)[steps[stayed]]
    taken = score[stayed].gather(-1, ids)
    inside = torch.zeros_like(allowed.expand_as(log_p[stayed])).scatter(-1, ids, True)
    passed_over = score[stayed].masked_fill(~certain[stayed] | inside, -torch.inf).max(-1).values
    explained = {
        "a component that was no candidate": possible[stayed].gather(-1, ids).all(-1),
        "components out of order": (taken[:, :-1] >= taken[:, 1:] - tolerance).all(-1),
        "a better candidate passed over": passed_over <= taken.min(-1).values + tolerance,
        "stayed in latent mode": (end_over_others[stayed] <= ahead) & (ids[:, 0] != end),
    }
    for problem, fine in explained.items():
        assert fine.all(), f"{problem} at steps {steps[stayed][~fine].tolist()} ({s})"
    if len(left):
        best = score[left].masked_fill(~certain[left], -torch.inf).max(-1).values
        first = possible[left, end] & (score[left, end] >= best - tolerance)
        leads = argmax_exits & (end_over_others[left] >= -tolerance)
        assert (leads | first).all(), f"left latent mode for no reason ({s})"
        assert sample.hard_ids[0] == end, f"left latent mode with token {sample.hard_ids[0]}"

    recorded = torch.from_numpy(sample.latent_log_probs).to(logits.device)[steps[stayed]]
    scores = torch.from_numpy(sample.latent_scores).to(logits.device)[steps[stayed]]
    off = (scores - recorded - noise[stayed].gather(-1, ids)).abs()
    assert (off <= NOISE_ROUNDING).all(), f"noise is {float(off.max()):.1e} from that of the record's key ({s})"
    alike = (drawn.ids[stayed] == ids).all(-1) & ~drawn.leaves[stayed]
    gaps = (whole[stayed].gather(-1, ids) - recorded).abs().flatten().tolist()
    hard = hard_gaps(logits[left], steps[left], sample)
    return Redraw(len(logits), int(alike.sum() + drawn.leaves[left].sum()), tuple(gaps), hard)


def visible_redraw(logits, keys, steps, sample, facts, allowed, tolerance) -> Redraw:
    """Steps in visible mode; as :func:`latent_redraw`."""
    s = sample.sampling
    drawn = visible_step(
        logits, keys, steps, temperature=s.temperature, top_p=s.top_p, top_k=s.top_k, allowed=allowed
    )  # fmt: skip
    every = torch.arange(logits.shape[-1], device=logits.device).expand(len(logits), -1)
    tolerance /= s.temperature
    log_p = (logits / s.temperature).log_softmax(-1).masked_fill(~allowed, -torch.inf)
    score = log_p + gumbel_noise(keys, steps, every)
    possible, certain = nucleus(log_p, s.top_p, tolerance, at_least=1, at_most=s.top_k or None)
    ids = torch.from_numpy(sample.hard_ids.astype(np.int64)).to(logits.device)[steps - len(sample.latent_ids)][:, None]
    best = score.masked_fill(~certain, -torch.inf).max(-1).values
    fine = possible.gather(-1, ids)[:, 0] & (score.gather(-1, ids)[:, 0] >= best - tolerance)
    assert fine.all(), f"another token than the one drawn at visible steps {steps[~fine].tolist()} ({s})"
    alike = int((drawn.ids == ids[:, 0]).sum())
    return Redraw(len(logits), alike, (), hard_gaps(logits, steps, sample))


def hard_gaps(logits, steps, sample) -> tuple[float, ...]:
    """|recorded - replayed| log-probs of those steps, which are hard: `logits` [n, V]."""
    at = (steps - len(sample.latent_ids)).cpu().numpy()
    ids = torch.from_numpy(sample.hard_ids[at].astype(np.int64)).to(logits.device)[:, None]
    replayed = (logits / sample.sampling.temperature).log_softmax(-1).gather(-1, ids)[:, 0]
    return tuple(np.abs(replayed.cpu().numpy() - sample.hard_log_probs[at]).tolist())


def nucleus(log_p, top_p, tolerance, *, at_least, at_most=None) -> tuple[torch.Tensor, torch.Tensor]:
    """Which ids may be candidates, and which must be, if log-probs [n, V] move by up to `tolerance`: two [n, V] bool.

    `at_least`: so many of the likeliest always are; `at_most`: the nucleus is of the so many likeliest, renormalised.
    """
    ordered = log_p.sort(-1).values.contiguous()
    mass = ordered.flip(-1).double().exp().cumsum(-1)
    mass = torch.cat([torch.zeros_like(mass[:, :1]), mass], -1)  # [n, 1 + V] of the so many likeliest
    total = 1.0 if at_most is None else mass[:, min(at_most, log_p.shape[-1]), None]
    found = []
    for margin in (tolerance, -tolerance):  # as few as possible before an id, then as many as possible
        before = log_p.shape[-1] - torch.searchsorted(ordered, (log_p + margin).contiguous(), right=True)
        own = margin < 0  # then an id counts as one before itself
        before_mass = mass.gather(-1, before) - own * log_p.double().exp()
        before = before - int(own)
        kept = (before_mass * np.exp(-margin) < top_p * total) | (before < at_least)
        found.append((kept | (top_p >= 1.0)) & (before < (at_most or log_p.shape[-1])) & log_p.isfinite())
    return found[0], found[1]
