"""A recorded run, read from dumps and checkpoints: the batches that the learner was given, and its states.

The state before step N is the checkpoint after step N - 1 (before the first step: the model that RL began from). If
that checkpoint is gone, an earlier one and the dumps of all steps between serve as well: the learner takes those steps
again, each on its recorded batch.
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from latent_grpo.common.config import ConfigError, RunConfig
from latent_grpo.common.learner_record import LearnerBatch, join
from latent_grpo.common.metrics import FILE as METRICS_FILE
from latent_grpo.common.metrics import read_metrics
from latent_grpo.common.schema import TrajectoryBatch, take_rows
from latent_grpo.common.store import DumpError, LearnerStore, TrajectoryStore, step_ranges
from latent_grpo.deploy.run.folder import RunFolder
from latent_grpo.learner.advantages import keep_groups
from latent_grpo.learner.checkpoint import CheckpointError, list_checkpoints, verify_checkpoint

log = logging.getLogger(__name__)


class RecordedError(ConfigError):
    """A step that cannot be computed again; the message says what is missing and which steps can."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedStep:
    """A step as it was recorded: its batch and its results."""

    step: int
    batch: pa.RecordBatch | None  # what the learner was given; None: no group had signal
    records: pa.RecordBatch | None  # of the batch's rows, in its order; None: the dump has none
    metrics: dict[str, float | None]  # of metrics.jsonl; empty where the line is missing


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """The learner's start: after `step` steps from a checkpoint, or (None, step 0) from the initial model."""

    step: int
    checkpoint: Path | None


class RecordedRun:
    """A run's folder, only read. `config` holds its settings. Raises MetricsError where its metrics cannot be read."""

    def __init__(self, folder: RunFolder, config: RunConfig):
        self.folder, self.config = folder, config
        self.trajectories = TrajectoryStore(folder.trajectories)
        self.records = LearnerStore(folder.learner_records)
        left_out: list[str] = []
        started = (folder.path / METRICS_FILE).exists()  # else it was killed before its first step
        lines = list(read_metrics(folder.path, left_out=left_out)) if started else []
        for sentence in left_out:
            log.warning("%s: left out", sentence)
        self._metrics = {row["step"]: row["metrics"] for row in lines}
        self._live = {(row["step"], row["lineage"]) for row in lines}
        self._lineages = dict(self._live)

    @property
    def base(self) -> str | Path:
        """The model that RL began from."""
        path = self.config.model.path
        if path is not None and self.config.warm_start is None:
            return path
        if not (self.folder.base_model / "config.json").is_file():
            raise RecordedError(f"{self.folder.path}: base/ has no model, since the run ended before RL began")
        return self.folder.base_model

    @property
    def dumped(self) -> list[int]:
        """Returns the steps whose trajectories were dumped, ascending."""
        return self.trajectories.steps()

    def dtype(self, step: int) -> str:
        """The `model.dtype` that the step was taken in; a resumed run may have another one."""
        dtypes, lineage = self.folder.identity().get("dtypes", []), self._lineages.get(step, 0)
        return next((dtype for dtype in dtypes[lineage:] if dtype is not None), self.config.model.dtype)

    def step(self, step: int) -> RecordedStep:
        """Reads a step. Raises :class:`RecordedError` if its dump is missing, unreadable or incomplete."""
        try:
            batch = self.trajectories.read(step)
            records = self.records.read(step) if step in self.records.steps() else None
        except DumpError as error:
            raise RecordedError(str(error)) from error
        self._check_whole(step, batch)
        rows = self._trained_rows(batch, records)
        chosen = take_rows(batch, rows) if len(rows) else None
        if records is not None:
            records = take_rows(records, join(batch, records)[rows])
        return RecordedStep(step=step, batch=chosen, records=records, metrics=self._metrics.get(step, {}))

    def _check_whole(self, step: int, batch: pa.RecordBatch) -> None:
        sizes = Counter(batch.column("group_uid").to_pylist())
        torn = [uid for uid, size in sizes.items() if size != self.config.group_size]
        if torn:
            raise RecordedError(
                f"the dump of step {step} is incomplete: {len(torn)} of {len(sizes)} groups lack samples, for example "
                f"group {torn[0]}, which has {sizes[torn[0]]} of {self.config.group_size} samples. The run was dumped "
                f"with dump.which: {self.config.dump.which}; only a run with dump.which: all can be replayed"
            )

    def _trained_rows(self, batch: pa.RecordBatch, records: pa.RecordBatch | None) -> np.ndarray:
        """Returns the rows of the groups trained on, from the learner's records or else from the rule (METHOD §4.3)."""
        if records is not None:
            places = join(batch, records)
            if (places < 0).any():
                raise RecordedError(
                    f"{(places < 0).sum()} of {batch.num_rows} trajectories of a step have no learner record: the two "
                    "files of the step do not belong together; was one of them replaced?"
                )
            return np.flatnonzero(LearnerBatch(records).taught[places])
        view = TrajectoryBatch(batch)
        _, group = np.unique(batch.column("group_uid").to_pylist(), return_inverse=True)
        kept = keep_groups(view.rewards, group, view.valid, masking=self.config.objective.masking).kept
        return np.flatnonzero(kept[group])

    # --- the learner's states --------------------------------------------------------------------------------------

    def starts(self) -> dict[int, Path | None]:
        """Returns the steps after which an undamaged state of the learner exists; 0 is the initial model."""
        found: dict[int, Path | None] = {0: None}
        for step, path in list_checkpoints(self.folder.checkpoints):
            try:
                state = verify_checkpoint(path)
            except CheckpointError:
                continue
            if (step, state["lineage"]) in self._live or step not in self._metrics:
                found[step] = path
        return found

    def start_for(self, step: int) -> Start:
        """Returns the nearest state from which step `step` can be reached. Raises :class:`RecordedError`."""
        if step < 1:
            raise RecordedError(f"step {step}: steps are numbered from 1")
        dumped, starts = set(self.dumped), self.starts()
        if step not in dumped:
            raise RecordedError(
                f"{self.trajectories.folder}: step {step} was not dumped, or its dump was removed; dumped: "
                f"{step_ranges(sorted(dumped)) or 'none'}. Which steps are dumped, and how long dumps are kept, is set "
                "by the section dump of the run's settings"
            )
        for start in sorted((s for s in starts if s < step), reverse=True):
            way = range(start + 1, step)
            if all(between in dumped and self.dtype(between) == self.dtype(step) for between in way):
                return Start(step=start, checkpoint=starts[start])
        checkpoints = step_ranges([s for s in starts if s]) or "none"
        raise RecordedError(
            f"step {step} needs the learner's state after step {step - 1}, or an earlier one and the dumps of all "
            f"steps between, taken in its own dtype ({self.dtype(step)}). Existing checkpoints: "
            f"{checkpoints} (and the initial model, 0); dumped steps: {step_ranges(sorted(dumped))}. Steps of this run "
            "that can be replayed: "
            f"{step_ranges(self.replayable()) or 'none'}. Keep more in the next run with checkpoint.every, "
            "checkpoint.keep and dump.every: 1"
        )

    def replayable(self) -> list[int]:
        """Returns the steps that a state and the dumps in between lead to."""
        dumped, found, states = self.dumped, [], set(self.starts())
        reach = set(states)
        for step in dumped:
            if step - 1 in states or (step - 1 in reach and self.dtype(step - 1) == self.dtype(step)):
                found.append(step)
                reach.add(step)
        return found
