"""A rollout engine on a Transformers causal language model, with its own decode loop over a KV cache (METHOD §2).

Each `step` of the engine::

    running rows --one forward, [n, D] embeddings in--> logits [n, V] ----\
                                                                            +-> sample -> record -> finished rows leave
    queued groups that fit --one prefill per prompt, shared by G samples--/

Latent and visible samples run side by side; every row carries its own settings. The state of the rows is one
structured array on the host (`ROW`), uploaded in one piece per step; records stay on the device until a sample ends.
A group's samples are alike until they draw: with the noise off they take their latent steps as one row, which becomes
one for each sample where it leaves latent mode.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection, Iterable, Iterator

import numpy as np
import torch
from transformers import PreTrainedModel

from latent_grpo.common.density import hard_log_prob
from latent_grpo.common.fingerprint import copy_with_fingerprint
from latent_grpo.common.head import float32_logits, install_float32_head
from latent_grpo.common.latent import latent_step, mix_embeddings, mixture_weights, visible_step
from latent_grpo.common.model_limits import longest_exact, refusal
from latent_grpo.common.types import FinishReason, GroupRequest, PolicyVersion, TokenFacts, Trajectory
from latent_grpo.common.weights import combine_checksums
from latent_grpo.rollout_workers.engine import EngineError
from latent_grpo.rollout_workers.kv_cache import SlotCache
from latent_grpo.rollout_workers.lean_forward import lean_forward
from latent_grpo.rollout_workers.records import Records
from latent_grpo.rollout_workers.requests import SETTINGS, Draw, RunningGroup, SampleRecord, admit, on_device
from latent_grpo.rollout_workers.weight_checks import TensorShape, check_checksum, checked_tensors

PREFILL_TOKENS = 16384  # padded prompt tokens of one prefill pass; it bounds memory, not admission

ROW = np.dtype([(name, np.int64) for name in ("slot", "length", "step")] + SETTINGS)
"""A running sample: `slot` is the place of its record, `length` its columns of the KV cache, `step` its steps done."""


class TransformersEngine:
    """Implements :class:`~rollout_workers.engine.LatentEngine` on any Llama-, Qwen2-, Qwen3- or GPT-2-like model.

    At most `max_rows` samples are decoded side by side; more wait in a queue, by whole groups. A `deterministic` engine
    takes one group at a time, in memory of its own, so that its arithmetic depends on it alone and repeats bit for bit.
    With `in_flight_updates`, `load_weights` does not wait for pending samples; their keys and values are recomputed
    under the new weights, and their trajectories name the first and the last version that sampled them.
    """

    name = "transformers"

    def __init__(
        self,
        model: PreTrainedModel,
        facts: TokenFacts,
        *,
        max_rows: int = 256,
        deterministic: bool = False,
        in_flight_updates: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        _check_model(model, facts, max_rows)
        self._device = torch.device(device)
        self._model = model.to(self._device).eval()  # type: ignore[arg-type]  # transformers' `to` loses its self
        self._facts, self._max_rows, self._deterministic = facts, max_rows, deterministic
        self._in_flight_updates = in_flight_updates
        # on CUDA no GPU has run it yet (docs/gpu.md)
        self._lean = lean_forward(self._model) if self._device.type == "cpu" else None
        self._embed, self._head = model.get_input_embeddings(), install_float32_head(model)
        self._additive_mask = model.config._attn_implementation == "eager"
        allowed = torch.as_tensor(np.asarray(facts.allowed, dtype=bool))
        self._allowed = None if bool(allowed.all()) else allowed.to(self._device)
        self._eos = np.asarray(facts.eos_ids, dtype=np.int64)
        self._version: PolicyVersion | None = None
        self._fingerprints: dict[str, str] = {}  # of the parameters, by their names; empty after a load that failed
        with torch.inference_mode():
            self._cache = SlotCache.of(self._model)
            self._records = Records(max_rows, self._device)
        self._reset()

    def _reset(self) -> None:
        self._queue: deque[RunningGroup] = deque()
        self._rows = np.zeros(self._max_rows, dtype=ROW)  # the first `_running` are in use
        self._running = self._queued = 0
        self._unborn = 0  # samples that another one's row stands for; they need rows of their own later
        self._inputs = torch.empty(0, device=self._device)  # [running, D]: what the next forward pass reads
        self._free_slots = list(range(self._max_rows))
        self._owner: dict[int, tuple[RunningGroup, list[int]]] = {}  # slot -> group, and the positions it stands for

    @property
    def version(self) -> PolicyVersion | None:
        """The version of the weights that are loaded; None: none yet."""
        return self._version

    @property
    def _weights(self) -> PolicyVersion:
        """The version of running samples, which always exists. Raises EngineError without verified weights."""
        if self._version is None:
            raise EngineError("the engine holds no verified weights; call load_weights first")
        return self._version

    @property
    def pending(self) -> int:
        """The number of samples that are not finished."""
        return self._running + self._unborn + self._queued

    # --- requests ------------------------------------------------------------------------------------------------

    def add(self, request: GroupRequest) -> None:
        """Queues a group; see :meth:`LatentEngine.add`."""
        group = admit(
            request, self._facts, self._version, max_rows=self._max_rows, max_length=longest_exact(self._model.config)
        )
        self._queue.append(group)
        self._queued += group.size

    def abort(self) -> None:
        """Drops all pending samples."""
        self._reset()

    def partial(self, group_uid: str, position: int) -> SampleRecord | None:
        """Returns a running sample's record so far; see :meth:`LatentEngine.partial`."""
        rows = self._rows[: self._running]
        for slot, (group, places) in self._owner.items():
            if group.request.group_uid == group_uid and position in places:
                (row,) = rows[rows["slot"] == slot]
                return self._records.take(slot, int(row["step"]), int(row["k"]))
        return None

    def close(self) -> None:
        """Frees the cache and the records; the engine then holds no version."""
        self._reset()
        self._version = None
        with torch.inference_mode():
            self._cache.fit(0, 0)
            self._records = Records(self._max_rows, self._device)

    # --- weights -------------------------------------------------------------------------------------------------

    def load_weights(
        self, version: PolicyVersion, tensors: Iterable[tuple[str, torch.Tensor]], unchanged: Collection[str] = ()
    ) -> None:
        """Replaces all parameters in place and verifies them; see :meth:`LatentEngine.load_weights`.

        With `in_flight_updates` pending samples continue under the new weights. After a failure they stop until a
        publication is loaded whole, or they are aborted.
        """
        if self.pending and not self._in_flight_updates:
            raise EngineError(
                f"cannot load version {version.version} while {self.pending} samples are pending: a sample never mixes "
                "versions; finish or abort them first, or set rollout.in_flight_updates"
            )
        self._version = None  # before the first byte changes: after any failure below the engine refuses to sample
        parameters = dict(self._model.named_parameters())  # aliases of tied parameters come once
        expected = {name: TensorShape.of(parameter) for name, parameter in parameters.items()}
        before, self._fingerprints = self._fingerprints, {}
        found = {name: before[name] for name in before.keys() & set(unchanged)}
        with torch.no_grad():
            for name, tensor in checked_tensors(version, tensors, expected):
                if name not in found:
                    found[name] = copy_with_fingerprint(name, tensor, parameters[name])
        check_checksum(version, combine_checksums(found.values()))
        self._fingerprints = found
        with torch.inference_mode():
            self._cache.clear()
            self._recompute()
        self._version = version

    def _recompute(self) -> None:
        """Fills the cleared cache of the running rows, and what they read next, with what the weights now make of them.

        What was drawn stays: tokens and mixtures are embedded again, whatever weights drew them.
        """
        histories: list[torch.Tensor] = []  # [length + 1, D] each, of neighbouring rows
        inputs = []
        for row in range(self._running):
            history = self._history(self._rows[row])
            longest = max([len(history), *map(len, histories)])
            if histories and (len(histories) + 1) * longest > PREFILL_TOKENS:
                self._refill(histories, row - len(histories))
                histories = []
            histories.append(history)
            inputs.append(history[-1])
        if inputs:
            self._refill(histories, self._running - len(histories))
            self._inputs = torch.stack(inputs)

    def _refill(self, histories: list[torch.Tensor], first: int) -> None:
        """Runs one pass over the histories of rows `first`..., right-padded, all but the last input of each."""
        padded = torch.nn.utils.rnn.pad_sequence([history[:-1] for history in histories], batch_first=True)
        output = self._model.base_model(inputs_embeds=padded, use_cache=True)
        self._cache.insert(output.past_key_values, torch.arange(len(histories), device=self._device), first)

    def _history(self, row: np.void) -> torch.Tensor:
        """Embeds a running sample's prompt, its mixtures and its hard tokens so far: [length + 1, D]."""
        slot, steps, k = int(row["slot"]), int(row["step"]), int(row["k"])
        latent = int(self._records.latent_until[slot])
        prompt = torch.as_tensor(np.asarray(self._owner[slot][0].request.prompt_ids), dtype=torch.int64)
        parts = [self._embed(prompt.to(self._device))]
        if latent:
            weights = mixture_weights(self._records.scores[slot, :latent, :k], float(row["tau"]))
            parts.append(mix_embeddings(self._embed(self._records.latent_ids[slot, :latent, :k].long()), weights))
        parts.append(self._embed(self._records.hard_ids[slot, latent:steps].long()))
        return torch.cat(parts)

    # --- the decode loop -----------------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self) -> list[tuple[Trajectory, ...]]:
        """Advances all running samples by one response step; see :meth:`LatentEngine.step`."""
        if self.pending and self._version is None:
            raise EngineError(
                f"the engine holds no verified weights and {self.pending} samples are pending; abort the pending "
                "samples and load_weights again, or load weights that are whole"
            )
        logits = [self._decode()] if self._running else []
        logits += self._admit()
        if not logits:
            return []
        hard = self._sample(logits[0] if len(logits) == 1 else torch.cat(logits))
        completed = self._retire(hard)
        if self._unborn:
            self._fork()
        return completed

    def _decode(self) -> torch.Tensor:
        """Runs one forward pass of the running rows: logits [n, V]."""
        rows = self._rows[: self._running]
        extent = int(rows["length"].max()) + 1
        positions = torch.from_numpy(rows["length"].copy()).to(self._device)
        mask = (torch.arange(extent, device=self._device) <= positions.unsqueeze(-1))[:, None, None]
        self._cache.begin_step(positions, extent)
        if self._lean is not None:
            rows["length"] += 1
            return float32_logits(self._head, self._lean(self._inputs, positions, self._cache, mask))
        if self._additive_mask:
            mask = torch.zeros_like(mask, dtype=self._model.dtype).masked_fill(
                ~mask, torch.finfo(self._model.dtype).min
            )
        hidden = self._model.base_model(
            inputs_embeds=self._inputs.unsqueeze(1),
            position_ids=positions.unsqueeze(-1),
            attention_mask=mask,
            past_key_values=self._cache,
            use_cache=True,
        ).last_hidden_state
        rows["length"] += 1
        return float32_logits(self._head, hidden[:, -1])

    def _admit(self) -> list[torch.Tensor]:
        """Admits queued groups that fit, in order of arrival; returns the logits of their prompts, [rows, V] each."""
        admitted: list[RunningGroup] = []
        room = self._max_rows - self._running - self._unborn
        if self._deterministic and self._running:
            return []
        while self._queue and self._queue[0].size <= room and not (self._deterministic and admitted):
            admitted.append(self._queue.popleft())
            room -= admitted[-1].size
        if not admitted:
            return []
        rows, length = sum(g.size for g in admitted), max(_columns(g.request) for g in admitted)
        if self._deterministic:
            self._cache.fit(rows, length)
        else:
            self._cache.reserve(self._running + self._unborn + rows, length, keep=self._running)
        sampling = [g.request.sampling for g in admitted]
        self._records.reserve(max(s.max_tokens for s in sampling), max(s.k for s in sampling))
        admitted.sort(key=lambda g: len(g.request.prompt_ids))  # neighbours in length: little padding in a prefill
        logits, first = [], 0
        for i, group in enumerate(admitted):
            following = len(admitted[i + 1].request.prompt_ids) if i + 1 < len(admitted) else PREFILL_TOKENS + 1
            if (i + 2 - first) * following > PREFILL_TOKENS:
                logits.append(self._prefill(admitted[first : i + 1]))
                first = i + 1
            self._queued -= group.size
        return logits

    def _prefill(self, groups: list[RunningGroup]) -> torch.Tensor:
        """Runs one pass over the groups' prompts, right-padded (a causal model's padding reaches no earlier position).

        Writes each prompt's keys and values into its rows (one for each sample, or one for all of them) and returns
        their next-step logits [rows, V].
        """
        lengths = np.array([len(g.request.prompt_ids) for g in groups])
        ids = np.full((len(groups), lengths.max()), self._facts.pad_id, dtype=np.int64)
        for line, group in zip(ids, groups):
            line[: len(group.request.prompt_ids)] = group.request.prompt_ids
        embedded = self._embed(torch.from_numpy(ids).to(self._device))
        output = self._model.base_model(inputs_embeds=embedded, use_cache=True)
        last = torch.from_numpy(lengths - 1).to(self._device)
        hidden = output.last_hidden_state[torch.arange(len(groups), device=self._device), last]
        owners = torch.from_numpy(np.repeat(np.arange(len(groups)), [_first_rows(g) for g in groups])).to(self._device)
        self._cache.insert(output.past_key_values, owners, self._running)
        for group in groups:
            self._start(group)
        return float32_logits(self._head, hidden)[owners]

    def _start(self, group: RunningGroup) -> None:
        """Fills the rows of a group whose prompt is in the cache."""
        count = _first_rows(group)
        rows = self._rows[self._running : self._running + count]
        rows["length"], rows["step"] = len(group.request.prompt_ids), 0
        for name in group.settings.dtype.names or ():
            rows[name] = group.settings[name][:count]
        for position in range(count):
            slot = self._free_slots.pop()
            self._owner[slot] = (group, list(range(group.size)) if count == 1 else [position])
            self._records.latent_until[slot] = 0
            rows["slot"][position] = slot
        group.started = time.perf_counter()
        self._running += count
        self._unborn += group.size - count

    def _fork(self) -> None:
        """Gives samples rows of their own where the row that stands for them has left latent mode."""
        for row in np.nonzero(self._rows["latent"][: self._running] == 0)[0]:
            source = int(self._rows["slot"][row])
            group, places = self._owner[source]
            if len(places) == 1:
                continue
            self._owner[source] = (group, places[:1])
            slots = [self._free_slots.pop() for _ in places[1:]]
            new = slice(self._running, self._running + len(slots))
            self._rows[new] = self._rows[row]
            self._rows["slot"][new], self._rows["key"][new] = slots, group.settings["key"][places[1:]]
            self._owner |= {slot: (group, [place]) for slot, place in zip(slots, places[1:], strict=True)}
            self._records.copy(source, slots, int(self._rows["step"][row]))
            targets = torch.arange(new.start, new.stop, device=self._device)
            self._cache.move(torch.full_like(targets, int(row)), targets, int(self._rows["length"][row]))
            self._inputs = torch.cat([self._inputs, self._inputs[row].expand(len(slots), -1)])
            self._running += len(slots)
            self._unborn -= len(slots)

    # --- sampling ------------------------------------------------------------------------------------------------

    def _sample(self, logits: torch.Tensor) -> np.ndarray:
        """Draws one step of every row from `logits` [n, V] and records it; leaves the next inputs in `_inputs`.

        Returns the sampled visible ids [n] int64, -1 for rows that took a latent step or left latent mode.
        """
        rows = self._rows[: self._running]
        table = on_device(rows, self._device)
        sampled = np.full(len(rows), -1, dtype=np.int64)
        widths = np.where(rows["latent"] == 1, rows["k"], 0)  # 0: visible
        kinds = np.unique(widths)
        parts = []
        for kind in kinds:
            index = np.nonzero(widths == kind)[0]
            draw = Draw(rows, table, logits) if len(kinds) == 1 else Draw(rows, table, logits, index)
            if kind:
                parts.append((index, self._latent_rows(draw, int(kind), index)))
            else:
                inputs, sampled[index] = self._visible_rows(draw)
                parts.append((index, inputs))
        if len(parts) == 1:
            self._inputs = parts[0][1]
        else:
            self._inputs = parts[0][1].new_empty(len(rows), parts[0][1].shape[-1])
            for index, inputs in parts:
                self._inputs[torch.from_numpy(index).to(self._device)] = inputs
        return sampled

    def _latent_rows(self, draw: Draw, k: int, index: np.ndarray) -> torch.Tensor:
        """Takes a step of rows in latent mode (METHOD §2.1-§2.3); returns their next inputs [n, D]."""
        end_id, slots, steps = self._facts.latent_end, draw.column("slot"), draw.column("step")
        taken = latent_step(
            draw.logits,
            draw.column("key"),
            steps,
            k=k,
            top_p=draw.setting("top_p"),
            noise_scale=draw.setting("noise_scale"),
            tau=draw.setting("tau"),
            noisy=draw.switch("noisy"),
            one_sided=draw.switch("one_sided"),
            argmax_exits=draw.switch("argmax_exits"),
            end_id=end_id,
            allowed=self._allowed,
        )
        self._records.latent_ids[slots, steps, :k] = taken.ids.int()
        self._records.scores[slots, steps, :k] = taken.scores
        self._records.log_probs[slots, steps, :k] = taken.log_probs
        inputs = mix_embeddings(self._embed(taken.ids), taken.weights)
        leaving = np.nonzero(taken.leaves.cpu().numpy())[0]
        if len(leaving):
            which = torch.from_numpy(leaving).to(self._device)
            ids = torch.full_like(which, end_id)
            self._records.hard_ids[slots[which], steps[which]] = end_id
            self._records.hard_log_probs[slots[which], steps[which]] = hard_log_prob(
                draw.logits[which], ids, draw.real("temperature")[which]
            )
            inputs[which] = self._embed(torch.tensor(end_id, device=self._device))
            self._rows["latent"][index[leaving]] = 0
        staying = self._rows[: self._running][index]
        staying = staying[staying["latent"] == 1]
        self._records.latent_until[staying["slot"]] = staying["step"] + 1
        return inputs

    def _visible_rows(self, draw: Draw) -> tuple[torch.Tensor, np.ndarray]:
        """Takes a step of rows in visible mode (METHOD §2.4); returns their next inputs [n, D] and the ids [n]."""
        slots, steps = draw.column("slot"), draw.column("step")
        ids, log_probs, _ = visible_step(
            draw.logits,
            draw.column("key"),
            steps,
            temperature=draw.setting("temperature"),
            top_p=draw.setting("top_p"),
            top_k=draw.count("top_k"),
            largest_top_k=draw.largest("top_k"),
            allowed=self._allowed,
        )
        self._records.hard_ids[slots, steps] = ids.int()
        self._records.hard_log_probs[slots, steps] = log_probs
        return self._embed(ids), ids.cpu().numpy()

    # --- finishing -----------------------------------------------------------------------------------------------

    def _retire(self, sampled: np.ndarray) -> list[tuple[Trajectory, ...]]:
        """Removes finished samples (METHOD §2.6) from the rows; returns the groups that this completes."""
        rows = self._rows[: self._running]
        rows["step"] += 1
        stopped = np.isin(sampled, self._eos) & (sampled >= 0)
        over = stopped | (rows["step"] >= rows["budget"])
        finished = np.nonzero(over)[0]
        if not len(finished):
            return []
        completed = [
            group for row in finished for group in self._close_row(rows[row], "stop" if stopped[row] else "length")
        ]
        remaining = len(rows) - len(finished)
        holes, tails = finished[finished < remaining], remaining + np.nonzero(~over[remaining:])[0]
        if len(holes):
            sources, targets = (torch.from_numpy(i).to(self._device) for i in (tails, holes))
            self._cache.move(sources, targets, int(rows["length"][tails].max()))
            self._inputs[targets] = self._inputs[sources]
            rows[holes] = rows[tails]
        self._inputs = self._inputs[:remaining]
        self._running = remaining
        return completed

    def _close_row(self, row: np.void, reason: FinishReason) -> Iterator[tuple[Trajectory, ...]]:
        """Frees a row's slot; yields its group if the row's samples were its last."""
        slot = int(row["slot"])
        group, places = self._owner.pop(slot)
        self._free_slots.append(slot)
        self._unborn -= len(places) - 1
        version, now = self._weights.version, time.perf_counter()
        for place in places:
            record = self._records.take(slot, int(row["step"]), int(row["k"]))
            done = group.finish(place, record, reason, engine=self.name, version=version, now=now)
            if done is not None:
                yield done


def _first_rows(group: RunningGroup) -> int:
    """Returns how many rows a group begins with: one if its samples take the same latent steps, else one each."""
    alike = (group.settings["latent"] == 1) & (group.settings["noisy"] == 0)
    return 1 if alike.all() else group.size


def _columns(request: GroupRequest) -> int:
    """Returns the number of KV columns that a sample can need."""
    return len(request.prompt_ids) + request.sampling.max_tokens


def _check_model(model: PreTrainedModel, facts: TokenFacts, max_rows: int) -> None:
    """Raises EngineError for a model that the decode loop cannot serve exactly."""
    head = model.get_output_embeddings()
    if head is None or head.weight.shape[0] != facts.vocab_size or len(facts.allowed) != facts.vocab_size:
        rows = None if head is None else head.weight.shape[0]
        raise EngineError(
            f"the model's output has {rows} rows, but the token facts have {facts.vocab_size} rows and "
            f"{len(facts.allowed)} flags; load both from the same model"
        )
    if model.config._attn_implementation not in ("sdpa", "eager"):
        raise EngineError(
            f"expected attention 'sdpa' or 'eager' (rows of different length need a mask), got "
            f"{model.config._attn_implementation!r}; load the model with attn_implementation='sdpa'"
        )
    if (reason := refusal(model.config)) is not None:
        raise EngineError(f"this {type(model).__name__} cannot be served: {reason}")
    if max_rows < 1:
        raise EngineError(f"max_rows must be >= 1, got {max_rows}")
