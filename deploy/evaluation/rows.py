"""What an evaluation asks for, and by which protocol's rules the samples become figures (METHOD §8).

    task ─► rows: protocol, noise ─► requests of samples ─┐   (those that sample alike share their samples)
                                                         ▼
            row's grading rule ─► tally ─► figures ◄── groups

A row is a line of the table. This project's protocol gives one row a task. The authors' gives one of a low task, and
two of a high one, with the noise off and on, since it is open which of them their published numbers are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import pyarrow as pa

from latent_grpo.common.config import EvaluationConfig, RunConfig
from latent_grpo.common.config.monitoring_and_checkpoints import PASS_AT_K, EvaluationProtocol
from latent_grpo.common.tasks.benchmarks import (
    REFERENCE_TEMPERATURE,
    REFERENCE_TOP_K,
    REFERENCE_TOP_P,
    reference_rules,
)
from latent_grpo.common.types import GroupRequest, NoiseMode, SamplingSettings
from latent_grpo.deploy.evaluation.scores import Tally, TaskResult
from latent_grpo.deploy.evaluation.whole_text import regraded
from latent_grpo.deploy.run.problems import PreparedTask, group_request, sampling_settings

NOISES: tuple[NoiseMode | None, ...] = ("off", None)  # None: the run's own


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """Samples that a figure is computed from: the first ones of each problem."""

    sampling: SamplingSettings
    samples: int
    problems: int  # the first ones of the task


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What one protocol measures of one task, with the noise off or on."""

    task: PreparedTask
    protocol: EvaluationProtocol
    grading: str | None  # a rule of `latent_grpo.reward.reference` on the whole text; None: the task's verifier
    uncut_lengths: bool
    pass_at_1: Asked
    pass_at_k: Asked | None  # with the noise on
    ks: tuple[int, ...]

    @property
    def noise(self) -> NoiseMode:
        """The noise of the row's samples."""
        return self.pass_at_1.sampling.noise_mode


def rows_of(config: RunConfig, task: PreparedTask, settings: EvaluationConfig) -> list[Row]:
    """Returns the rows of a task. `settings` are those of the evaluation, the rest of `config` those of sampling."""
    found = []
    if "ours" in task.protocols:
        found.append(_own(config, task, settings))
    if "reference" in task.protocols:
        found += _reference(config, task, settings)
    return found


def interim_rows(rows: Sequence[Row], settings: EvaluationConfig) -> list[Row]:
    """Returns what evaluations between a run's start and end measure of `rows` (`evaluation.interim_*`).

    That is the first problems of each task, by its first protocol and with the noise off, without pass@k.
    """
    chosen: dict[str, Row] = {}
    for row in rows:
        chosen.setdefault(row.task.name, row)
    return [
        dataclasses.replace(
            row,
            pass_at_1=dataclasses.replace(
                row.pass_at_1,
                problems=min(row.pass_at_1.problems, settings.interim_problems or row.pass_at_1.problems),
                samples=min(row.pass_at_1.samples, settings.interim_runs or row.pass_at_1.samples),
            ),
            pass_at_k=None,
            ks=(),
        )
        for row in chosen.values()
    ]


def _own(config: RunConfig, task: PreparedTask, settings: EvaluationConfig) -> Row:
    size, budget = _size(task), task.source.config.max_response_tokens
    noisy = Asked(
        sampling=sampling_settings(config, budget),
        samples=settings.samples,
        problems=min(size, settings.sampled_problems or size),
    )
    return Row(
        task=task,
        protocol="ours",
        grading=None,
        uncut_lengths=False,
        pass_at_1=Asked(sampling=sampling_settings(config, budget, "off"), samples=settings.runs, problems=size),
        pass_at_k=noisy if settings.samples else None,
        ks=tuple(settings.ks),
    )


def _reference(config: RunConfig, task: PreparedTask, settings: EvaluationConfig) -> list[Row]:
    rules = reference_rules(task.name)
    if rules is None:
        raise ValueError(f"task {task.name} is not of the protocol reference")
    size, budget = _size(task), task.source.config.max_response_tokens
    quiet, noisy = (
        dataclasses.replace(
            sampling_settings(config, budget, noise),
            temperature=REFERENCE_TEMPERATURE,
            top_p=REFERENCE_TOP_P,
            top_k=REFERENCE_TOP_K,
        )
        for noise in NOISES
    )
    sampled = Asked(
        sampling=noisy, samples=settings.samples, problems=min(size, settings.sampled_problems or size)
    )  # more than the runs, where pass@k is asked for

    def row(sampling: SamplingSettings, at_k: Asked | None, ks: Sequence[int]) -> Row:
        return Row(
            task=task,
            protocol="reference",
            grading=rules.verifier,
            uncut_lengths=rules.uncut_lengths,
            pass_at_1=Asked(sampling=sampling, samples=rules.runs, problems=size),
            pass_at_k=at_k,
            ks=tuple(ks),
        )

    with_noise = sampled if settings.samples else None
    found = [row(quiet, with_noise, settings.ks)]
    if rules.noise_too and noisy != quiet:
        runs = Asked(sampling=noisy, samples=rules.runs, problems=size)
        more = settings.samples > rules.runs
        ks = settings.ks if more else [k for k in PASS_AT_K if k <= rules.runs]
        found.append(row(noisy, sampled if more else runs, ks))
    return found


def _size(task: PreparedTask) -> int:
    if task.source.size is None:
        raise ValueError(f"task {task.name} is endless")  # refused when it is read
    return task.source.size


# --- samples -------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class SampleSet:
    """The samples of one task at one sampling, and the tallies of the rows that use them."""

    task: PreparedTask
    sampling: SamplingSettings
    grading: str | None  # of the row that asked first, which the samples keep
    stage: str  # part of the progress's name
    mark: str  # part of the groups' identity
    users: list[tuple[Asked, str | None, Tally]] = field(default_factory=list)

    @property
    def samples(self) -> int:
        """The number of samples of all problems."""
        return sum(self._samples(index) for index in range(self._problems))

    @property
    def _problems(self) -> int:
        return max(asked.problems for asked, _, _ in self.users)

    def _samples(self, index: int) -> int:
        return max(asked.samples for asked, _, _ in self.users if index < asked.problems)

    def requests(self, config: RunConfig, tag: str) -> Iterator[GroupRequest]:
        """Yields the request of each problem's group, as large as the rows need it."""
        for index in range(self._problems):
            problem = self.task.source.problem(index)
            yield group_request(
                config,
                self.task,
                problem,
                samples=self._samples(index),
                purpose="evaluation",
                uid=f"evaluation/{tag}{self.mark}/{problem.uid}",
                sampling=self.sampling,
                verifier=self.grading,
            )

    def take(self, index: int, group: pa.RecordBatch) -> pa.RecordBatch:
        """Counts the group of problem `index` in every row that uses it; returns it as it is to be kept."""
        kept = group if self.grading is None else regraded(group, self.grading, self._decode)
        for asked, grading, tally in self.users:
            if index < asked.problems:
                part = kept if grading == self.grading or grading is None else regraded(group, grading, self._decode)
                tally.add(part.slice(0, asked.samples))
        return kept

    def _decode(self, ids: list[int]) -> str:
        return str(self.task.renderer.tokenizer.decode(ids, skip_special_tokens=False))


@dataclass(frozen=True, slots=True)
class Measured:
    """A row with the tallies of its samples."""

    row: Row
    at_1: Tally
    at_k: Tally | None

    def result(self) -> TaskResult:
        """Returns the row's figures, once all of its samples are counted."""
        row, task = self.row, self.row.task.source.config
        return dataclasses.replace(
            self.at_1.result(self.row.task.name),
            pass_at_k=() if self.at_k is None else self.at_k.pass_at_k(row.ks),
            protocol=row.protocol,
            noise=row.noise,
            budget=task.max_response_tokens,
        )


def planned(rows: Sequence[Row]) -> tuple[list[Measured], list[SampleSet]]:
    """Returns the rows with empty tallies, and the sets of samples that fill them."""
    sets: dict[tuple[int, SamplingSettings], SampleSet] = {}
    measured = []
    for row in rows:
        at_1 = Tally(uncut_lengths=row.uncut_lengths)
        at_k = None if row.pass_at_k is None else Tally()
        for asked, tally in ((row.pass_at_1, at_1), (row.pass_at_k, at_k)):
            if asked is not None and tally is not None:
                key = (id(row.task.source), asked.sampling)
                found = sets.setdefault(key, _set(row, asked))
                found.users.append((asked, row.grading, tally))
        measured.append(Measured(row, at_1, at_k))
    return measured, list(sets.values())


def _set(row: Row, asked: Asked) -> SampleSet:
    noisy = asked.sampling.noise_mode != "off"
    if row.protocol == "ours":
        stage, mark = ("pass@k {}", "-sampled") if noisy else ("evaluate {}", "")
    else:
        stage, mark = (
            ("evaluate {}, reference, noise on", "-reference-noise")
            if noisy
            else ("evaluate {}, reference", "-reference")
        )
    return SampleSet(row.task, asked.sampling, row.grading, stage, mark)
