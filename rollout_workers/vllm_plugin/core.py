"""The state and the draws of latent rollouts on the device, for both of vLLM's model runners (METHOD §2).

A sample has a slot from its first scheduled token until its record is taken; preemption does not touch it. Everything
is kept by response step, so one rule covers decoding, chunked prefill, recomputation after preemption and a step that
vLLM ran ahead and threw away:

* the token at position p is fed as a mixture if and only if 0 <= p - prompt_len < the slot's number of latent steps;
* response step j is drawn in latent mode if and only if the sample began latent and all steps before j were latent.

For a latent step vLLM sees a placeholder token, since a proxy id (METHOD §2.1) may be a stop id and would end the
request. The record holds the true ids.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from latent_grpo.common.density import hard_log_prob
from latent_grpo.common.latent import latent_step, mix_embeddings, mixture_weights, visible_step
from latent_grpo.rollout_workers.requests import SETTINGS, Draw, SampleRecord, on_device, upload

COLUMNS = [("prompt_len", np.int64), ("careful", np.int64), *SETTINGS]
ROW = np.dtype(COLUMNS)
"""A slot's settings. With `careful`, draws consider as many ids as needed, which waits for the device; else a fixed
number."""
PLACE = {name: place for place, (name, _) in enumerate(COLUMNS)}
"""The column of each setting on the device, where a row is int64 [columns]."""
SCRATCH = 0  # a slot without an owner, for rows that do not count


@dataclass(frozen=True, slots=True, kw_only=True)
class Record(SampleRecord):
    """A finished sample's record, with two facts that the engine needs."""

    exact: bool  # False: a draw may depend on ids that were not considered; sample again with `careful`
    started: float  # time.monotonic() when it was first scheduled


class LatentCore:
    """The state of latent samples on the device, and their draws.

    `allowed` is [V] bool or None; `end_id` is None only where no request is latent; `placeholder` must not be a stop
    id. Memory for `slots` samples of `steps` response steps of `width` components is taken at once, so that vLLM counts
    it when it measures the device. It grows for samples beyond that.
    """

    _ids: torch.Tensor  # [slots, steps, width] int32
    _scores: torch.Tensor  # [slots, steps, width] float32
    _log_probs: torch.Tensor  # [slots, steps, width] float32
    _table: torch.Tensor  # [slots, columns] int64: ROW
    _latent_steps: torch.Tensor  # [slots] int64
    _inexact: torch.Tensor  # [slots] bool

    def __init__(
        self,
        device: torch.device,
        *,
        slots: int,
        steps: int,
        width: int,
        allowed: np.ndarray | None,
        end_id: int | None,
        placeholder: int,
    ) -> None:
        self.device = device
        self._allowed = None if allowed is None else torch.from_numpy(allowed).to(device)
        self._end_id = -1 if end_id is None else end_id  # -1: of no token
        self._placeholder = placeholder
        self.warming = False  # vLLM's own requests, without settings, are tried on the scratch slot
        self.slots: dict[int, int] = {}  # by uid
        self._free: list[int] = []
        self._steps, self._width = 0, 0
        self._host = np.zeros(0, dtype=ROW)  # [slots]
        self._started: list[float] = []
        self._fresh: list[int] = []  # slots whose settings the device does not have yet
        self._grow(1 + slots, steps, width)
        for name, value in (("k", 1), ("top_k", 1), ("temperature", 1.0), ("top_p", 1.0), ("tau", 1.0)):
            self._host[SCRATCH][name] = value  # for the draws of vLLM's warm-up requests
        self._fresh.append(SCRATCH)

    @property
    def record_bytes(self) -> int:
        """The bytes that the records of all slots take on the device."""
        return self._ids.nbytes + self._scores.nbytes + self._log_probs.nbytes

    # --- slots of samples ----------------------------------------------------------------------------------------

    def add(self, uid: int, prompt_len: int, settings: dict[str, Any]) -> int:
        """Returns the slot of a sample; a preempted one keeps its slot and history. `settings` are those of `ROW`."""
        if uid in self.slots:
            return self.slots[uid]
        if not self._free:
            self._grow(2 * len(self._host), self._steps, self._width)
        self._grow(len(self._host), settings["budget"], settings["k"] if settings["latent"] else 1)
        slot = self.slots[uid] = self._free.pop()
        row = self._host[slot]
        row["prompt_len"] = prompt_len
        for name, value in settings.items():
            row[name] = value
        self._started[slot] = time.monotonic()
        self._fresh.append(slot)
        return slot

    def forget(self, uids: Sequence[int]) -> None:
        """Frees the slots of samples that are no longer needed."""
        self._free.extend(self.slots.pop(uid) for uid in uids if uid in self.slots)

    def take(self, uids: Sequence[int], steps: Sequence[int]) -> list[Record]:
        """Returns the records of finished samples with their numbers of response steps, and frees their slots."""
        records = self.look(uids, steps)
        self.forget(uids)
        return records

    def look(self, uids: Sequence[int], steps: Sequence[int]) -> list[Record]:
        """Returns the records of so many response steps of samples, which may go on."""
        slots, total = [self.slots[uid] for uid in uids], sum(steps)
        index = upload(np.array(slots), self.device)
        tables = [table.view(torch.int32) for table in (self._ids, self._scores, self._log_probs)]
        # everything in one copy, since each copy would wait until the device has caught up
        parts = [torch.stack([self._latent_steps[index].int(), self._inexact[index].int()])]
        parts += [table[slot, :count] for table in tables for slot, count in zip(slots, steps, strict=True)]
        packed = torch.cat([part.flatten() for part in parts]).cpu().numpy()
        head, body = packed[: 2 * len(slots)].reshape(2, -1), packed[2 * len(slots) :].reshape(3, total, self._width)
        latent, inexact = np.minimum(head[0], steps).tolist(), head[1].tolist()
        ids, scores, log_probs = body[0], body[1].view(np.float32), body[2].view(np.float32)
        records, start = [], 0
        for i, slot in enumerate(slots):
            k, middle, end = int(self._host[slot]["k"]), start + latent[i], start + steps[i]
            records.append(
                Record(
                    latent_ids=_mixtures(ids[start:middle], k),
                    latent_scores=_mixtures(scores[start:middle], k),
                    latent_log_probs=_mixtures(log_probs[start:middle], k),
                    hard_ids=ids[middle:end, 0].copy(),
                    hard_log_probs=log_probs[middle:end, 0].copy(),
                    exact=not inexact[i],
                    started=self._started[slot],
                )
            )
            start = end
        return records

    def _grow(self, slots: int, steps: int, width: int) -> None:
        """Makes room for so many slots, response steps and components; the content stays."""
        old_slots, old_steps, old_width = len(self._host), self._steps, self._width
        if slots <= old_slots and steps <= old_steps and width <= old_width:
            return
        slots, steps, width = max(slots, old_slots), max(steps, old_steps), max(width, old_width)

        def grown(name: str, shape: tuple[int, ...], dtype: torch.dtype, fill: float = 0) -> None:
            new = torch.full(shape, fill, dtype=dtype, device=self.device)
            if old_slots:
                old = getattr(self, name)
                new[tuple(slice(size) for size in old.shape)] = old
            setattr(self, name, new)

        grown("_ids", (slots, steps, width), torch.int32)
        grown("_scores", (slots, steps, width), torch.float32, -torch.inf)  # beyond a sample's K: weight 0
        grown("_log_probs", (slots, steps, width), torch.float32)
        grown("_table", (slots, len(COLUMNS)), torch.int64)
        grown("_latent_steps", (slots,), torch.int64)
        grown("_inexact", (slots,), torch.bool)
        self._host = np.concatenate([self._host, np.zeros(slots - old_slots, dtype=ROW)])
        self._started += [0.0] * (slots - old_slots)
        self._free += range(slots - 1, max(old_slots, SCRATCH + 1) - 1, -1)
        self._steps, self._width = steps, width

    def _settle(self) -> None:
        """Copies the settings of new samples to the device in one piece and empties their histories."""
        if not self._fresh:
            return
        slots = np.array(self._fresh)
        index = upload(slots, self.device)
        self._table[index] = on_device(self._host[slots], self.device)
        self._latent_steps[index] = 0
        self._inexact[index] = False
        self._scores[index] = -torch.inf
        self._fresh.clear()

    # --- inputs --------------------------------------------------------------------------------------------------

    def generated_rows(
        self, slots: np.ndarray, computed: np.ndarray, query_start: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns which tokens of a batch come after their prompt: (their places in the batch, their slots). Host only.

        `slots` [n] and `computed` [n] hold each request's slot and number of tokens in the KV cache; `query_start` is
        [n + 1].
        """
        counts = np.diff(query_start)
        request = np.repeat(np.arange(len(counts)), counts)
        places = np.arange(query_start[0], query_start[-1])
        position = places - query_start[request] + computed[request]
        behind = np.nonzero(position >= self._host["prompt_len"][slots[request]])[0]
        return places[behind], slots[request[behind]]

    def feed(
        self,
        inputs: torch.Tensor,
        places: np.ndarray,
        slots: np.ndarray,
        positions: torch.Tensor,
        embed: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        """Writes mixtures over the embeddings `inputs` [T, D] at those `places` that were latent steps.

        `positions` [T] are those of all tokens of the batch; `embed` maps ids to embeddings.
        """
        if not len(places):
            return
        self._settle()
        place, slot = upload(places, self.device), upload(slots, self.device)
        step = positions[place] - self._column(slot, "prompt_len")
        latent = step < self._latent_steps[slot]
        step = step.clamp(max=self._steps - 1)
        ids = self._ids[slot, step]
        weights = mixture_weights(self._scores[slot, step], self._real(slot, "tau"))
        mixed = mix_embeddings(embed(ids.flatten()).view(*ids.shape, -1), weights)
        inputs[place] = torch.where(latent.unsqueeze(-1), mixed, inputs[place])

    def _column(self, slot: torch.Tensor, name: str) -> torch.Tensor:
        return self._table[slot, PLACE[name]]

    def _real(self, slot: torch.Tensor, name: str) -> torch.Tensor:
        return self._column(slot, name).view(torch.float64)

    # --- draws ---------------------------------------------------------------------------------------------------

    def draw(
        self, logits: torch.Tensor, slots: np.ndarray, positions: torch.Tensor, complete: torch.Tensor
    ) -> torch.Tensor:
        """Draws one response step of every request: `logits` [n, V] -> the tokens that vLLM continues with, [n] int64.

        `slots` [n] are on the host; `positions` [n] are those of the tokens that gave the logits. `complete` [n] bool
        is False for a request whose prompt (or recomputed history) is not all in the cache yet; it draws nothing.
        """
        self._settle()
        rows, slot = self._host[slots], upload(slots, self.device)
        table = self._table[slot]
        step = positions.long() + 1 - table[:, PLACE["prompt_len"]]
        latent = (table[:, PLACE["latent"]] == 1) & (self._latent_steps[slot] >= step)
        careful = bool(rows["careful"].any())
        if careful:  # the mode of each row is known, so each sampler gets only its own rows
            wanted = complete.cpu().numpy()
            in_latent = wanted & latent.cpu().numpy()
            in_visible = wanted & ~in_latent
        else:
            in_latent, in_visible = rows["latent"] == 1, np.ones(len(rows), dtype=bool)
        target = torch.where(complete, slot, SCRATCH)
        step = torch.where(target == SCRATCH, 0, step)
        tokens = torch.full_like(slot, self._placeholder)
        if in_visible.any():
            index = None if in_visible.all() else np.nonzero(in_visible)[0]
            hard = torch.where(latent, SCRATCH, target)
            self._draw_visible(Draw(rows, table, logits, index), index, tokens, hard, step, careful)
        for k in np.unique(rows["k"][in_latent]):
            index = np.nonzero(in_latent & (rows["k"] == k))[0]
            index = None if len(index) == len(rows) else index
            mixed = torch.where(latent, target, SCRATCH)
            self._draw_latent(Draw(rows, table, logits, index), index, tokens, mixed, step, latent, int(k), careful)
        return tokens

    def _draw_visible(
        self,
        draw: Draw,
        index: np.ndarray | None,
        tokens: torch.Tensor,
        target: torch.Tensor,
        step: torch.Tensor,
        careful: bool,
    ) -> None:
        """Draws visible steps (METHOD §2.4) and records them in column 0 of the step."""
        at = slice(None) if index is None else upload(index, self.device)
        target, step = target[at], step[at]
        drawn = visible_step(
            draw.logits,
            draw.column("key"),
            step,
            temperature=draw.setting("temperature"),
            top_p=draw.setting("top_p"),
            top_k=draw.count("top_k"),
            largest_top_k=draw.largest("top_k"),
            allowed=self._allowed,
            widen=careful,
        )
        self._ids[target, step, 0] = drawn.ids.int()
        self._log_probs[target, step, 0] = drawn.log_probs
        self._inexact[target] |= ~drawn.exact
        tokens[at] = drawn.ids

    def _draw_latent(
        self,
        draw: Draw,
        index: np.ndarray | None,
        tokens: torch.Tensor,
        target: torch.Tensor,
        step: torch.Tensor,
        latent: torch.Tensor,
        k: int,
        careful: bool,
    ) -> None:
        """Draws steps of rows in latent mode (METHOD §2.1-§2.3); where a row leaves it, the step is the end token."""
        at = slice(None) if index is None else upload(index, self.device)
        target, step = target[at], step[at]
        taken = latent_step(
            draw.logits,
            draw.column("key"),
            step,
            k=k,
            top_p=draw.setting("top_p"),
            noise_scale=draw.setting("noise_scale"),
            tau=draw.setting("tau"),
            noisy=draw.switch("noisy"),
            one_sided=draw.switch("one_sided"),
            argmax_exits=draw.switch("argmax_exits"),
            end_id=self._end_id,
            allowed=self._allowed,
            widen=careful,
        )
        end, temperature = torch.full_like(step, self._end_id), draw.real("temperature")
        if careful:
            end_log_prob, which = torch.zeros_like(taken.scores[:, 0]), taken.leaves.nonzero().squeeze(-1)
            end_log_prob[which] = hard_log_prob(draw.logits[which], end[which], temperature[which])
        else:
            end_log_prob = hard_log_prob(draw.logits, end, temperature)
        leaves = taken.leaves.unsqueeze(-1)
        self._ids[target, step, :k] = torch.where(leaves, self._end_id, taken.ids).int()
        self._scores[target, step, :k] = taken.scores
        self._log_probs[target, step, :k] = torch.where(leaves, end_log_prob.unsqueeze(-1), taken.log_probs)
        self._latent_steps[target] = torch.where(taken.leaves, step, step + 1)
        self._inexact[target] |= ~taken.exact
        proxy = torch.where(taken.leaves, self._end_id, self._placeholder)
        tokens[at] = torch.where(latent[at], proxy, tokens[at])


def _mixtures(steps: np.ndarray, k: int) -> np.ndarray:
    """Cuts [L, width] to [L, k]; the tables may be narrower than the k of samples that are never latent."""
    return steps[:, :k].copy() if len(steps) else np.empty((0, k), steps.dtype)
