"""A rollout engine on a Transformers causal language model, with its own decode loop over a KV cache (METHOD §2).

Each `step` of the engine::

    running rows --one forward, [n, D] embeddings in--> logits [n, V] ----\
                                                                            +-> Decoder.draw -> finished rows leave
    queued groups that fit --one prefill per prompt, shared by G samples--/

Latent and visible samples run side by side; every row carries its own settings. What a step is, its draws and its
records are the decoder's (`decoding.py`), on the device; the host knows which row of the cache is whose (`ROW`).

With `run_ahead`, for devices that compute asynchronously (CUDA), the host looks at what ended in the step before. A
finished row then takes a step too many, which is thrown away, and records arrive a step later, when the device already
has the next one. Without it rows end at once: on a CPU asking costs nothing. A step that runs ahead and admits nobody
can be a graph (`step_graphs.py`).

A group's samples are alike until they draw: with the noise off they take their latent steps as one row, which becomes
one for each sample where it leaves latent mode.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Collection, Iterable

import numpy as np
import torch
from transformers import PreTrainedModel

from latent_grpo.common.fingerprint import copy_with_fingerprint
from latent_grpo.common.model_limits import longest_exact
from latent_grpo.common.types import FinishReason, GroupRequest, PolicyVersion, TokenFacts, Trajectory
from latent_grpo.common.weights import combine_checksums
from latent_grpo.rollout_workers.decoding import Decoder, Step
from latent_grpo.rollout_workers.engine import EngineError
from latent_grpo.rollout_workers.forward_pass import ForwardPass, check_model
from latent_grpo.rollout_workers.requests import Download, Rows, RunningGroup, SampleRecord, admit, upload
from latent_grpo.rollout_workers.samples import ROW, Ended, Outcome, Queued
from latent_grpo.rollout_workers.step_graphs import Capture, StepGraphs
from latent_grpo.rollout_workers.weight_checks import TensorShape, check_checksum, checked_tensors

RUN_AHEAD_PROVEN_ON_CUDA = False
"""Whether `run_ahead` was run on a GPU (docs/gpu.md)."""
PREFILL_TOKENS = 16384  # padded prompt tokens of one prefill pass; it bounds memory, not admission


class TransformersEngine:
    """Implements :class:`~rollout_workers.engine.LatentEngine` on any Llama-, Qwen2-, Qwen3- or GPT-2-like model.

    At most `max_rows` samples are decoded side by side; more wait in a queue, by whole groups. A `deterministic` engine
    takes one group at a time, in memory of its own, so that its arithmetic depends on it alone and repeats bit for bit.
    With `in_flight_updates`, `load_weights` does not wait for pending samples; their keys and values are recomputed
    under the new weights, and their trajectories name the version whose key they have and the last that sampled them.
    `run_ahead` waits for nothing but records that the step before has asked for (None: on CUDA, once proven); a sample
    whose draws then turn out to need more ids than were considered is decoded again. `capture` records steps, which
    then run ahead; None: they are not recorded.
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
        run_ahead: bool | None = None,
        capture: Capture | None = None,
    ) -> None:
        check_model(model, facts, max_rows)
        self._device = torch.device(device)
        self._model = model.to(self._device).eval()  # type: ignore[arg-type]  # transformers' `to` loses its self
        self._facts, self._max_rows, self._deterministic = facts, max_rows, deterministic
        self._in_flight_updates = in_flight_updates
        self._forward = ForwardPass(self._model)
        self._embed, self._cache = self._forward.embed, self._forward.cache
        ahead = RUN_AHEAD_PROVEN_ON_CUDA and self._device.type == "cuda"
        self._run_ahead = capture is not None or (ahead if run_ahead is None else run_ahead)
        self._eos = torch.tensor(facts.eos_ids, dtype=torch.int64, device=self._device)
        self._version: PolicyVersion | None = None
        self._fingerprints: dict[str, str] = {}  # of the parameters, by their names; empty after a load that failed
        self._graphs = None if capture is None else StepGraphs(self._take_step, capture, max_rows=max_rows)
        self._reset()

    def _reset(self) -> None:
        self._queue: deque[Queued] = deque()
        self._rows = np.zeros(self._max_rows, dtype=ROW)  # the first `_running` are in use
        self._running = self._queued = 0
        self._unborn = 0  # samples that another one's row stands for; they need rows of their own later
        self._inputs = torch.empty(0, device=self._device)  # [running, D]: what the next forward pass reads
        self._uids = itertools.count()
        self._owner: dict[int, tuple[RunningGroup, list[int]]] = {}  # uid -> group, and the positions it stands for
        self._unseen: Outcome | None = None  # of the step before, with `run_ahead`
        self._ended: list[Ended] = []
        self._decoder = self._new_decoder(self._max_rows)

    @torch.inference_mode()
    def _new_decoder(self, slots: int) -> Decoder:
        allowed = np.asarray(self._facts.allowed, dtype=bool)
        return Decoder(
            self._device,
            slots=slots,
            steps=1,  # it grows with the requests
            width=1,
            allowed=None if allowed.all() else allowed,
            end_id=self._facts.latent_end_id,
            placeholder=self._facts.pad_id,
        )

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
        leaving = sum(len(places) for ended in self._ended for _, places, _ in ended.samples)
        return self._running + self._unborn + self._queued + leaving

    # --- requests ------------------------------------------------------------------------------------------------

    def add(self, request: GroupRequest) -> None:
        """Queues a group; see :meth:`LatentEngine.add`."""
        group = admit(
            request, self._facts, self._version, max_rows=self._max_rows, max_length=longest_exact(self._model.config)
        )
        self._enqueue(Queued(group=group, places=list(range(group.size)), careful=not self._run_ahead))

    def _enqueue(self, queued: Queued) -> None:
        self._queue.append(queued)
        self._queued += len(queued.places)

    def abort(self) -> None:
        """Drops all pending samples."""
        self._reset()

    def partial(self, group_uid: str, position: int) -> SampleRecord | None:
        """Returns a running sample's record so far; see :meth:`LatentEngine.partial`."""
        for uid, (group, places) in self._owner.items():
            if group.request.group_uid == group_uid and position in places:
                (row,) = self._rows[: self._running][self._rows["uid"][: self._running] == uid]
                if self._unseen is not None and bool(self._unseen.over[self._unseen.rows["uid"] == uid].any()):
                    return None  # it has ended, which the next step will see
                steps = int(row["length"] - row["prompt_len"]) + 1
                record = self._decoder.look([uid], [steps]).records()[0]
                return record if record.exact else None  # it will be decoded again
        return None

    def close(self) -> None:
        """Frees the cache and the records; the engine then holds no version."""
        self._reset()
        self._version = None
        self._decoder = self._new_decoder(0)
        if self._graphs is not None:
            self._graphs.clear()
        with torch.inference_mode():
            self._cache.fit(0, 0)

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
        owners = torch.arange(len(histories), device=self._device)
        self._forward.read(padded, torch.zeros_like(owners), owners, first)

    def _history(self, row: np.void) -> torch.Tensor:
        """Embeds a running sample's prompt, its mixtures and its hard tokens so far: [length + 1, D]."""
        uid, steps = int(row["uid"]), int(row["length"] - row["prompt_len"]) + 1
        prompt = torch.as_tensor(np.asarray(self._owner[uid][0].request.prompt_ids), dtype=torch.int64)
        return torch.cat([self._embed(prompt.to(self._device)), self._decoder.history(uid, steps, self._embed)])

    # --- the decode loop -----------------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self) -> list[tuple[Trajectory, ...]]:
        """Advances all running samples by one response step; see :meth:`LatentEngine.step`."""
        if self.pending and self._version is None:
            raise EngineError(
                f"the engine holds no verified weights and {self.pending} samples are pending; abort the pending "
                "samples and load_weights again, or load weights that are whole"
            )
        completed: list[tuple[Trajectory, ...]] = []
        outcome = None if self._graphs is None else self._take_graph(self._graphs)
        if outcome is None:
            logits = [self._decode()] if self._running else []
            logits += self._admit()
            outcome = self._draw(logits[0] if len(logits) == 1 else torch.cat(logits)) if logits else None
        if self._run_ahead:
            outcome, self._unseen = self._unseen, outcome
            completed = self._complete()  # the device works at the next step while the host waits for records
        if outcome is not None:
            if outcome.over.any():
                self._retire(outcome)
            if outcome.left.any():
                self._leave_latent_mode(outcome)
        return completed if self._run_ahead else self._complete()

    def _decode(self) -> torch.Tensor:
        """Runs one forward pass of the running rows: logits [n, V]."""
        rows = self._rows[: self._running]
        extent = int(rows["length"].max()) + 1
        positions = upload(rows["length"], self._device)
        rows["length"] += 1
        return self._forward.logits(self._inputs, positions, extent)

    def _take_graph(self, graphs: StepGraphs) -> Outcome | None:
        """Takes a step of the running rows as a graph.

        None if there are none, others join them, their k differ, or one is careful, whose draws wait for the device.
        """
        if not self._running or self._next_fits():
            return None
        rows, size = self._rows[: self._running], graphs.rows(self._running)
        padded = np.pad(rows, (0, size - len(rows)), mode="edge")  # draws of the last row again, which do not count
        settings = self._decoder.rows(padded["slot"])
        if settings.careful or len(settings.latent_widths) > 1:
            return None
        self._cache.reserve(size, 0, keep=len(rows))
        padded["length"][len(rows) :] = 0
        complete = padded["length"] + 1 - padded["prompt_len"] < padded["budget"]
        complete[len(rows) :] = False
        layouts = (self._cache.layout, self._decoder.layout)
        self._inputs, codes = graphs.take(
            self._inputs, padded["length"], complete, settings, self._cache.capacity, layouts
        )
        rows["length"] += 1
        return Outcome(rows=rows.copy(), codes=Download(codes), version=self._weights.version)

    def _take_step(
        self, inputs: torch.Tensor, positions: torch.Tensor, complete: torch.Tensor, rows: Rows, columns: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Implements :class:`~rollout_workers.step_graphs.TakeStep`."""
        logits = self._forward.logits(inputs, positions, columns)
        drawn = self._decoder.draw_rows(logits, rows, positions, complete, self._embed)
        return drawn.inputs, self._codes(drawn)

    def _admit(self) -> list[torch.Tensor]:
        """Admits queued groups that fit, in order of arrival; returns the logits of their prompts, [rows, V] each."""
        admitted: list[Queued] = []
        while self._next_fits(sum(len(q.places) for q in admitted)):
            admitted.append(self._queue.popleft())
        if not admitted:
            return []
        rows, length = sum(len(q.places) for q in admitted), max(q.columns for q in admitted)
        self._queued -= rows
        if self._deterministic:
            self._cache.fit(rows, length)
        else:
            self._cache.reserve(self._running + self._unborn + rows, length, keep=self._running)
        admitted.sort(
            key=lambda q: len(q.group.request.prompt_ids)
        )  # neighbours in length: little padding in a prefill
        prompts = [len(q.group.request.prompt_ids) for q in admitted]
        logits, first = [], 0
        for i, following in enumerate([*prompts[1:], PREFILL_TOKENS + 1]):
            if (i + 2 - first) * following > PREFILL_TOKENS:
                logits.append(self._prefill(admitted[first : i + 1]))
                first = i + 1
        return logits

    def _next_fits(self, admitted: int = 0) -> bool:
        """Whether the next group in the queue has room beside so many that are admitted; if deterministic, alone."""
        taken = self._running + self._unborn + admitted
        if not self._queue or (self._deterministic and taken):
            return False
        return taken + len(self._queue[0].places) <= self._max_rows

    def _prefill(self, groups: list[Queued]) -> torch.Tensor:
        """Runs one pass over the groups' prompts, right-padded (a causal model's padding reaches no earlier position).

        Writes each prompt's keys and values into its rows (one for each sample, or one for all of them) and returns
        their next-step logits [rows, V].
        """
        lengths = np.array([len(q.group.request.prompt_ids) for q in groups])
        ids = np.full((len(groups), lengths.max()), self._facts.pad_id, dtype=np.int64)
        for line, queued, length in zip(ids, groups, lengths):
            line[:length] = queued.group.request.prompt_ids
        owners = upload(np.repeat(np.arange(len(groups)), [queued.first_rows for queued in groups]), self._device)
        hidden = self._forward.read(
            self._embed(upload(ids, self._device)), upload(lengths - 1, self._device), owners, self._running
        )
        for queued in groups:
            self._start(queued)
        return self._forward.head(hidden)[owners]

    def _start(self, queued: Queued) -> None:
        """Fills the rows of samples whose prompt is in the cache."""
        group, count = queued.group, queued.first_rows
        group.started = group.started or time.perf_counter()
        prompt_len, names = len(group.request.prompt_ids), group.settings.dtype.names or ()
        for place in queued.places[:count]:
            uid, settings = next(self._uids), dict(zip(names, group.settings[place].item(), strict=True))
            slot = self._decoder.add(uid, prompt_len, settings | {"careful": int(queued.careful)})
            self._rows[self._running] = (uid, slot, prompt_len, settings["budget"], prompt_len, settings["latent"])
            self._owner[uid] = (group, queued.places if count == 1 else [place])
            self._running += 1
        self._unborn += len(queued.places) - count

    def _draw(self, logits: torch.Tensor) -> Outcome:
        """Draws one step of every row from `logits` [n, V]; leaves the next inputs in `_inputs`."""
        rows, complete = self._rows[: self._running].copy(), None
        within = rows["length"] - rows["prompt_len"] < rows["budget"]
        if not within.all():  # ended in the step before, which is not seen yet
            complete = upload(within, self._device).bool()
        drawn = self._decoder.draw(
            logits, rows["slot"], upload(rows["length"] - 1, self._device), complete, self._embed
        )
        self._inputs = drawn.inputs
        return Outcome(rows=rows, codes=Download(self._codes(drawn)), version=self._weights.version)

    def _codes(self, drawn: Step) -> torch.Tensor:
        """Returns what the host needs to know of a step: the codes of :class:`Outcome`, [n] int64."""
        stopped = (drawn.tokens.unsqueeze(-1) == self._eos).any(-1) & drawn.visible
        return stopped + 2 * drawn.latent

    def _leave_latent_mode(self, outcome: Outcome) -> None:
        """Gives samples rows of their own where the row that stands for them has left latent mode."""
        for uid, steps in zip(outcome.rows["uid"][outcome.left].tolist(), outcome.steps[outcome.left].tolist()):
            if uid not in self._owner:
                continue
            (row,) = np.nonzero(self._rows["uid"][: self._running] == uid)[0]
            self._rows["latent"][row] = 0
            self._decoder.left_latent_mode([uid])
            group, places = self._owner[uid]
            if len(places) > 1:
                self._fork(int(row), group, places, steps)

    def _fork(self, row: int, group: RunningGroup, places: list[int], steps: int) -> None:
        """Gives all samples of a row but the first rows of their own, whose last of so many steps was the end token."""
        uid, count = int(self._rows["uid"][row]), len(places) - 1
        others = dict(zip(itertools.islice(self._uids, count), group.settings["key"][places[1:]].tolist()))
        self._decoder.fork(uid, others, steps)
        self._owner |= {other: (group, [place]) for other, place in zip(others, places[1:], strict=True)}
        self._owner[uid] = (group, places[:1])
        new = slice(self._running, self._running + count)
        self._rows[new] = self._rows[row]
        self._rows["uid"][new], self._rows["slot"][new] = list(others), [self._decoder.slots[u] for u in others]
        self._rows["length"][new] = length = int(self._rows["prompt_len"][row]) + steps - 1
        targets = torch.arange(new.start, new.stop, device=self._device)
        self._cache.move(torch.full_like(targets, row), targets, length)
        end = torch.full_like(targets, self._facts.latent_end_id or 0)
        self._inputs = torch.cat([self._inputs, self._embed(end)])
        self._running += count
        self._unborn -= count

    # --- finishing -----------------------------------------------------------------------------------------------

    def _retire(self, outcome: Outcome) -> None:
        """Removes the samples that a step finished (METHOD §2.6) from the rows and fetches their records."""
        over = [i for i in np.nonzero(outcome.over)[0].tolist() if int(outcome.rows["uid"][i]) in self._owner]
        if not over:
            return
        uids, stopped = outcome.rows["uid"][over].tolist(), (outcome.codes.numpy()[over] & 1).tolist()
        samples: list[tuple[RunningGroup, list[int], FinishReason]] = []
        for uid, stop in zip(uids, stopped):
            group, places = self._owner.pop(uid)
            samples.append((group, places, "stop" if stop else "length"))
            self._unborn -= len(places) - 1
        fetch = self._decoder.take(uids, outcome.steps[over].tolist())
        self._ended.append(Ended(fetch=fetch, samples=samples, version=outcome.version))
        rows = self._rows[: self._running]
        gone = np.isin(rows["uid"], uids)
        remaining = len(rows) - len(over)
        holes, tails = np.nonzero(gone[:remaining])[0], remaining + np.nonzero(~gone[remaining:])[0]
        if len(holes):
            sources, targets = (upload(i, self._device) for i in (tails, holes))
            self._cache.move(sources, targets, int(rows["length"][tails].max()))
            self._inputs[targets] = self._inputs[sources]
            rows[holes] = rows[tails]
        self._inputs = self._inputs[:remaining]
        self._running = remaining

    def _complete(self) -> list[tuple[Trajectory, ...]]:
        """Makes trajectories of the records that have arrived; returns the groups that this completes.

        Samples whose draws may depend on ids that were not considered are decoded again, carefully.
        """
        arrived, self._ended = self._ended, []
        completed, now = [], time.perf_counter()
        for ended in arrived:
            for record, (group, places, reason) in zip(ended.fetch.records(), ended.samples, strict=True):
                if not record.exact:
                    self._enqueue(Queued(group=group, places=places, careful=True))
                    continue
                for place in places:
                    done = group.finish(place, record, reason, engine=self.name, version=ended.version, now=now)
                    completed += [] if done is None else [done]
        return completed
