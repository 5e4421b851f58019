"""The decoder of both engines: the state of samples on the device, their draws and their records (METHOD §2).

A sample has a slot from its start until its record is taken; preemption by vLLM does not touch it. Everything is kept
by response step, so one rule covers decoding, chunked prefill, recomputation after preemption or under new weights, and
a step that was run ahead and thrown away:

* the token at position p is fed as a mixture if and only if 0 <= p - prompt_len < the slot's number of latent steps;
* response step j is drawn in latent mode if and only if the sample began latent and all steps before j were latent.

A step comes from one of two ways, which draw the same. Where no row is `careful`, nothing waits for the device: both
samplers draw for every row that may need them, and the device takes the one that counts. Where one is, the host asks
for each row's mode and gives each sampler only its own rows, and draws consider as many ids as they need.

vLLM sees a placeholder token for a latent step, since a proxy id (METHOD §2.1) may be a stop id and would end the
request. The record holds the true ids.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from latent_grpo.common.density import hard_log_prob
from latent_grpo.common.latent import latent_step, mix_embeddings, mixture_weights, visible_step
from latent_grpo.rollout_workers.requests import SETTINGS, Download, Rows, SampleRecord, on_device, upload

COLUMNS = [("prompt_len", np.int64), ("careful", np.int64), *SETTINGS]
ROW = np.dtype(COLUMNS)
"""A slot's settings. With `careful`, draws consider as many ids as needed, which waits for the device; else a fixed
number."""
PLACE = {name: place for place, (name, _) in enumerate(COLUMNS)}
"""The column of each setting on the device, where a row is int64 [columns]."""
NEVER = 2**31 - 1  # a step after all others
SCRATCH = 0  # a slot without an owner, for rows that do not count
PARTS = 3  # of a record's component: id, score and log-prob
MINUS_INFINITY = int(np.float32(-np.inf).view(np.int32))

Embed = Callable[[torch.Tensor], torch.Tensor]  # ids [...] -> embeddings [..., D]


@dataclass(frozen=True, slots=True, kw_only=True)
class Record(SampleRecord):
    """A finished sample's record, with two facts that the engine needs."""

    exact: bool  # False: a draw may depend on ids that were not considered; sample again with `careful`
    started: float  # time.monotonic() when it was first scheduled


class Step(NamedTuple):
    """One response step of n rows."""

    tokens: torch.Tensor  # [n] int64: the hard ids; a placeholder for latent steps
    visible: torch.Tensor  # [n] bool: drawn in visible mode (the token that leaves latent mode is not)
    latent: torch.Tensor  # [n] bool: a latent step
    inputs: torch.Tensor  # [n, D]: what the model reads next; empty where the caller did not say how to embed


class Fetch:
    """Records on their way to the host; `records` waits for them, and for nothing that the device was given later."""

    def __init__(self, packed: torch.Tensor, started: list[float], steps: Sequence[int], ks: list[int], width: int):
        self._packed, self._started, self._steps, self._ks, self._width = Download(packed), started, steps, ks, width

    def records(self) -> list[Record]:
        """Returns the records, in the order in which they were requested."""
        packed, count = self._packed.numpy(), len(self._steps)
        latent = np.minimum(packed[:count], self._steps).tolist()
        exact = (packed[count : 2 * count] >= self._steps).tolist()  # a step too many was thrown away
        body = packed[2 * count :].reshape(-1, self._width, PARTS)
        ids, scores, log_probs = body[..., 0], body[..., 1].view(np.float32), body[..., 2].view(np.float32)
        records, start = [], 0
        for i, k in enumerate(self._ks):
            middle, end = start + latent[i], start + self._steps[i]
            records.append(
                Record(
                    latent_ids=_mixtures(ids[start:middle], k),
                    latent_scores=_mixtures(scores[start:middle], k),
                    latent_log_probs=_mixtures(log_probs[start:middle], k),
                    hard_ids=ids[middle:end, 0].copy(),
                    hard_log_probs=log_probs[middle:end, 0].copy(),
                    exact=exact[i],
                    started=self._started[i],
                )
            )
            start = end
        return records


def _mixtures(steps: np.ndarray, k: int) -> np.ndarray:
    """Cuts [L, width] to [L, k]; the tables may be narrower than the k of samples that are never latent."""
    return steps[:, :k].copy() if len(steps) else np.empty((0, k), steps.dtype)


class Decoder:
    """The state of samples on the device, and their draws.

    `allowed` is [V] bool or None; `end_id` is None only where no request is latent; `placeholder` must not be a stop
    id. Memory for `slots` samples of `steps` response steps of `width` components is taken at once, so that vLLM counts
    it when it measures the device. It grows for samples beyond that.
    """

    _records: torch.Tensor  # [slots, steps, width, PARTS] int32: ids, and the bits of float32 scores and log-probs
    _table: torch.Tensor  # [slots, columns] int64: ROW
    _latent_steps: torch.Tensor  # [slots] int64
    _inexact_from: torch.Tensor  # [slots] int64: the first step drawn from too few ids, NEVER

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
        self._batch: tuple[np.ndarray, Rows] | None = None  # the slots of the step before, and their settings
        self.layout: object = None  # another one whenever the state on the device has moved
        self._grow(1 + slots, steps, width)
        for name, value in (("k", 1), ("top_k", 1), ("temperature", 1.0), ("top_p", 1.0), ("tau", 1.0)):
            self._host[SCRATCH][name] = value  # for the draws of vLLM's warm-up requests
        self._fresh.append(SCRATCH)

    @property
    def record_bytes(self) -> int:
        """The bytes that the records of all slots take on the device."""
        return self._records.nbytes

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

    def fork(self, uid: int, others: dict[int, int], steps: int) -> None:
        """Adds samples that took the first `steps` steps of `uid` with it: `others` has the key of each by its uid."""
        source = self.slots[uid]
        settings = {name: self._host[source][name].item() for name in PLACE if name != "prompt_len"}
        prompt_len = int(self._host[source]["prompt_len"])
        slots = [self.add(other, prompt_len, settings | {"key": key}) for other, key in others.items()]
        self._settle()  # which empties histories
        index = upload(np.array(slots), self.device)
        for state in (self._records[:, :steps], self._latent_steps):
            state[index] = state[source].clone()
        inexact_from = self._inexact_from[source]  # a later step is the source's own
        self._inexact_from[index] = torch.where(inexact_from < steps, inexact_from, NEVER)

    def left_latent_mode(self, uids: Sequence[int]) -> None:
        """Tells the host what the device knows: these samples take hard steps alone from here on."""
        for uid in uids:
            self._host["latent"][self.slots[uid]] = 0
        self._batch = None

    def forget(self, uids: Sequence[int]) -> None:
        """Frees the slots of samples that are no longer needed."""
        self._free.extend(self.slots.pop(uid) for uid in uids if uid in self.slots)

    def take(self, uids: Sequence[int], steps: Sequence[int]) -> Fetch:
        """Fetches the records of finished samples with their numbers of response steps, and frees their slots."""
        fetch = self.look(uids, steps)
        self.forget(uids)
        return fetch

    def look(self, uids: Sequence[int], steps: Sequence[int]) -> Fetch:
        """Fetches the records of so many response steps of samples, which may go on."""
        slots = [self.slots[uid] for uid in uids]
        index = upload(np.array(slots), self.device)
        # everything in one copy, since each copy would wait until the device has caught up
        parts = [self._latent_steps[index].int(), self._inexact_from[index].int()]
        parts += [self._records[slot, :count].flatten() for slot, count in zip(slots, steps, strict=True)]
        ks = self._host["k"][slots].tolist()
        return Fetch(torch.cat(parts), [self._started[slot] for slot in slots], steps, ks, self._width)

    def _grow(self, slots: int, steps: int, width: int) -> None:
        """Makes room for so many slots, response steps and components; the content stays."""
        old_slots, old_steps, old_width = len(self._host), self._steps, self._width
        if slots <= old_slots and steps <= old_steps and width <= old_width:
            return
        slots, steps, width = max(slots, old_slots), max(steps, old_steps), max(width, old_width)

        def grown(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
            new = torch.zeros(shape, dtype=dtype, device=self.device)
            if old_slots:
                old = getattr(self, name)
                new[tuple(slice(size) for size in old.shape)] = old
            setattr(self, name, new)

        grown("_records", (slots, steps, width, PARTS), torch.int32)
        self._records[:, :, old_width:, 1] = MINUS_INFINITY  # beyond a sample's K: weight 0
        grown("_table", (slots, len(COLUMNS)), torch.int64)
        grown("_latent_steps", (slots,), torch.int64)
        grown("_inexact_from", (slots,), torch.int64)
        self._host = np.concatenate([self._host, np.zeros(slots - old_slots, dtype=ROW)])
        self._started += [0.0] * (slots - old_slots)
        self._free += range(slots - 1, max(old_slots, SCRATCH + 1) - 1, -1)
        self._steps, self._width = steps, width
        self.layout = object()

    def _settle(self) -> None:
        """Copies the settings of new samples to the device in one piece and empties their histories."""
        if not self._fresh:
            return
        slots = np.array(self._fresh)
        index = upload(slots, self.device)
        self._table[index] = on_device(self._host[slots], self.device)
        self._latent_steps[index] = 0
        self._inexact_from[index] = NEVER
        self._records[index, :, :, 1] = MINUS_INFINITY
        self._fresh.clear()
        self._batch = None

    def rows(self, slots: np.ndarray) -> Rows:
        """Returns the settings of a step's rows: mostly those of the step before, and then the same object."""
        self._settle()
        if self._batch is None or not np.array_equal(self._batch[0], slots):
            index = upload(slots, self.device)
            self._batch = (slots.copy(), Rows(self._host[slots], self._table[index], index))
        return self._batch[1]

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
        self, inputs: torch.Tensor, places: np.ndarray, slots: np.ndarray, positions: torch.Tensor, embed: Embed
    ) -> None:
        """Writes mixtures over the embeddings `inputs` [T, D] at those `places` that were latent steps.

        `positions` [T] are those of all tokens of the batch; `embed` maps ids to embeddings.
        """
        if not len(places):
            return
        self._settle()
        place, slot = upload(places, self.device), upload(slots, self.device)
        table = self._table[slot]
        step = positions[place] - table[:, PLACE["prompt_len"]]
        latent = step < self._latent_steps[slot]
        records = self._records[slot, step.clamp(max=self._steps - 1)]
        ids, scores = records[..., 0], records[..., 1].view(torch.float32)
        weights = mixture_weights(scores, table[:, PLACE["tau"]].view(torch.float64))
        mixed = mix_embeddings(embed(ids.flatten()).view(*ids.shape, -1), weights)
        inputs[place] = torch.where(latent.unsqueeze(-1), mixed, inputs[place])

    def history(self, uid: int, steps: int, embed: Embed) -> torch.Tensor:
        """Returns what the model reads for the first `steps` response steps of a sample: [steps, D]."""
        slot = self.slots[uid]
        inputs = embed(self._records[slot, :steps, 0, 0].long())
        positions = torch.arange(steps, device=self.device) + int(self._host[slot]["prompt_len"])
        self.feed(inputs, np.arange(steps), np.full(steps, slot), positions, embed)
        return inputs

    # --- draws ---------------------------------------------------------------------------------------------------

    def draw(
        self,
        logits: torch.Tensor,
        slots: np.ndarray,
        positions: torch.Tensor,
        complete: torch.Tensor | None = None,
        embed: Embed | None = None,
    ) -> Step:
        """Draws one response step of every row from its `logits` [n, V] and records it.

        `slots` [n] are on the host; `positions` [n] are those of the tokens that gave the logits. `complete` [n] bool
        is False for a row that draws nothing, such as a request whose prompt (or recomputed history) is not all in the
        cache yet; None: all draw. `embed` maps ids to embeddings, where the caller wants the next inputs.
        """
        return self.draw_rows(logits, self.rows(slots), positions, complete, embed)

    def draw_rows(
        self,
        logits: torch.Tensor,
        rows: Rows,
        positions: torch.Tensor,
        complete: torch.Tensor | None = None,
        embed: Embed | None = None,
    ) -> Step:
        """Draws as :meth:`draw` does, for the `rows` of the slots (:meth:`rows`)."""
        step, target = positions.long() + 1 - rows.column("prompt_len"), rows.slot
        latent = torch.zeros_like(step, dtype=torch.bool)
        if rows.begin_latent:
            latent = (rows.column("latent") == 1) & (self._latent_steps[target] >= step)
        if complete is not None:
            target = torch.where(complete, target, SCRATCH)
            step = torch.where(target == SCRATCH, 0, step)
        tokens = torch.full_like(step, self._placeholder)
        turn = _Turn(rows, logits, step, target, latent, tokens, torch.zeros_like(latent))
        mixtures = []
        for index, k in _samplers(rows, latent, complete):
            if k:
                mixtures += self._draw_latent(turn, index, k, embed)
            else:
                self._draw_visible(turn, index)
        inputs = logits.new_empty(0) if embed is None else embed(turn.tokens)
        for at, mixed in mixtures:
            inputs[at] = torch.where(turn.stays[at].unsqueeze(-1), mixed, inputs[at])
        return Step(turn.tokens, ~latent, turn.stays, inputs)

    def _draw_visible(self, turn: _Turn, index: np.ndarray | None) -> None:
        """Draws visible steps (METHOD §2.4) and records them in component 0 of the step."""
        at, rows = self._at(index), turn.rows.part(index)
        step = turn.step[at]
        drawn = visible_step(
            turn.logits[at],
            rows.column("key"),
            step,
            temperature=rows.setting("temperature"),
            top_p=rows.setting("top_p"),
            top_k=rows.count("top_k"),
            largest_top_k=rows.largest("top_k"),
            some_unbounded=rows.some_unbounded,
            allowed=self._allowed,
            widen=turn.careful,
        )
        target = turn.target[at] if turn.careful else torch.where(turn.latent, SCRATCH, turn.target)[at]
        log_probs = drawn.log_probs.view(torch.int32)
        self._records[target, step, 0] = torch.stack([drawn.ids.int(), log_probs, log_probs], -1)
        if not turn.careful:
            self._note_inexact(target, step, drawn.exact)
        turn.tokens[at] = drawn.ids

    def _draw_latent(
        self, turn: _Turn, index: np.ndarray | None, k: int, embed: Embed | None
    ) -> list[tuple[Any, torch.Tensor]]:
        """Draws steps of rows in latent mode (METHOD §2.1-§2.3); where a row leaves it, the step is the end token.

        Returns the rows' places and mixtures [m, D], where the caller can embed.
        """
        at, rows = self._at(index), turn.rows.part(index)
        step, logits, latent = turn.step[at], turn.logits[at], turn.latent[at]
        taken = latent_step(
            logits,
            rows.column("key"),
            step,
            k=k,
            top_p=rows.setting("top_p"),
            noise_scale=rows.setting("noise_scale"),
            tau=rows.setting("tau"),
            noisy=rows.switch("noisy"),
            one_sided=rows.switch("one_sided"),
            argmax_exits=rows.switch("argmax_exits"),
            end_id=self._end_id,
            allowed=self._allowed,
            widen=turn.careful,
        )
        parts = [taken.ids, taken.scores, taken.log_probs]
        if not turn.careful or bool(taken.leaves.any()):
            end, leaves = torch.full_like(step, self._end_id), taken.leaves.unsqueeze(-1)
            end_log_prob = hard_log_prob(logits, end, rows.real("temperature")).unsqueeze(-1)
            parts[0], parts[2] = (
                torch.where(leaves, self._end_id, parts[0]),
                torch.where(leaves, end_log_prob, parts[2]),
            )
        target = turn.target[at] if turn.careful else torch.where(turn.latent, turn.target, SCRATCH)[at]
        packed = torch.stack([parts[0].int(), parts[1].view(torch.int32), parts[2].view(torch.int32)], -1)
        self._records[target, step, :k] = packed
        self._latent_steps[target] = torch.where(taken.leaves, step, step + 1)
        if not turn.careful:
            self._note_inexact(target, step, taken.exact)
        proxy = torch.where(taken.leaves, self._end_id, self._placeholder)
        turn.tokens[at] = torch.where(latent, proxy, turn.tokens[at])
        turn.stays[at] = latent & ~taken.leaves
        return [] if embed is None else [(at, mix_embeddings(embed(taken.ids), taken.weights))]

    def _note_inexact(self, target: torch.Tensor, step: torch.Tensor, exact: torch.Tensor) -> None:
        self._inexact_from[target] = torch.minimum(self._inexact_from[target], torch.where(exact, NEVER, step))

    def _at(self, index: np.ndarray | None) -> Any:
        """The places of some rows, as a tensor is indexed; None: of all."""
        return slice(None) if index is None else upload(index, self.device)


@dataclass(slots=True)
class _Turn:
    """A step that is being drawn: what its rows have, and what has been found. All [n] but the logits [n, V]."""

    rows: Rows
    logits: torch.Tensor
    step: torch.Tensor
    target: torch.Tensor  # slots; SCRATCH for rows that draw nothing
    latent: torch.Tensor  # bool: in latent mode
    tokens: torch.Tensor
    stays: torch.Tensor  # bool: took a latent step

    @property
    def careful(self) -> bool:
        """Whether the step may wait for the device; then each sampler has only its own rows."""
        return self.rows.careful


def _samplers(
    rows: Rows, latent: torch.Tensor, complete: torch.Tensor | None
) -> Iterator[tuple[np.ndarray | None, int]]:
    """Yields the rows of each sampler (None: all), with k of the latent ones and 0 for visible steps, those first."""
    in_visible, in_latent = np.ones(len(rows.host), dtype=bool), rows.host["latent"] == 1
    if rows.careful:  # the mode of each row is known, so each sampler gets only its own rows
        modes = latent.cpu().numpy()
        wanted = in_visible if complete is None else complete.cpu().numpy()
        in_visible, in_latent = wanted & ~modes, wanted & modes
    parts = [(in_visible, 0)]
    if in_latent.any():
        widths = rows.host["k"]
        parts += [(in_latent & (widths == k), int(k)) for k in np.unique(widths[in_latent])]
    for chosen, k in parts:
        if chosen.all() or rows.every_row:
            yield None, k
        elif chosen.any():
            yield np.nonzero(chosen)[0], k
