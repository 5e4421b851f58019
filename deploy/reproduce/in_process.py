"""The pipeline's loop in one process: no Ray, no DeepSpeed, one thread; rollouts and training take turns.

It is the baseline for the cost of the distributed loop (`latent-grpo bench loop`), and the cheap runner of a suite
(`runner: in_process`). Engine, prompts, controller, method and run folder are the pipeline's own; three things differ:

* the pool is a list of requests that `poll` generates and grades at once,
* the learner is one rank whose optimizer is plain torch AdamW,
* weights go from one to the other as tensors.

It has no worker to lose, no time limit for verifiers and no checkpoints of RL steps.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Collection, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import nn

from latent_grpo.common.config import ConfigError, OptimizerConfig, RunConfig
from latent_grpo.common.metrics import MetricsWriter
from latent_grpo.common.models import load_model
from latent_grpo.common.schema import encode
from latent_grpo.common.types import GroupRequest, PolicyVersion, Trajectory
from latent_grpo.common.weights import checksum
from latent_grpo.deploy.controller import Controller, gather
from latent_grpo.deploy.evaluation.evaluate import evaluate
from latent_grpo.deploy.run.folder import RunFolder
from latent_grpo.deploy.run.preparation import Prepared, prepare
from latent_grpo.deploy.run.progress import Reporter
from latent_grpo.deploy.run.self_test import self_test
from latent_grpo.deploy.run.session import Run
from latent_grpo.deploy.sft.loop import warm_start
from latent_grpo.learner.base_rank import RankActor
from latent_grpo.learner.gaps import ReplayReport, summarize_gaps
from latent_grpo.learner.learner import summarize
from latent_grpo.learner.policy import load_policy_model
from latent_grpo.learner.rank import LearnerRank
from latent_grpo.learner.sft.learner import SFTRank, merged
from latent_grpo.learner.sft.rows import SFTRow
from latent_grpo.learner.zero_engine import LearnerDiverged, UpdateResult
from latent_grpo.reward.answers import grade
from latent_grpo.rollout_workers.engine import generate
from latent_grpo.rollout_workers.factory import ResponseText
from latent_grpo.rollout_workers.transformers_engine import TransformersEngine

Weights = tuple[PolicyVersion, list[tuple[str, torch.Tensor]]]


def versioned(version: int, parameters: Iterable[tuple[str, torch.Tensor]]) -> Weights:
    """Makes the weights that the pool takes as a publication."""
    tensors = [(name, parameter.detach()) for name, parameter in parameters]
    return PolicyVersion(version=version, checksum=checksum(tensors)), tensors


class InProcessPool:
    """A `Pool` for the controller. `poll` generates everything that was submitted and returns it graded."""

    def __init__(self, config: RunConfig, prepared: Prepared, run_id: str):
        self._config, self._run_id = config, run_id
        facts = prepared.model.facts
        self._engine = TransformersEngine(
            load_model(prepared.initial, config.model.dtype, config.model.max_positions),
            facts,
            max_rows=config.rollout.max_rows * config.rollout.workers,
            deterministic=config.deterministic,
        )
        self._text = ResponseText(prepared.model.tokenizer, facts.eos_ids)
        self._waiting: list[GroupRequest] = []

    def submit(self, requests: list[GroupRequest]) -> None:
        self._waiting += requests

    def discard(self) -> None:
        self._waiting.clear()

    def publish(self, publication: Weights) -> None:
        self._engine.load_weights(*publication)

    def poll(self, timeout_s: float = 0.0) -> list[pa.RecordBatch]:
        requests, self._waiting = self._waiting, []
        verifiers = {request.group_uid: request.verifier for request in requests}
        return [self._graded(group, verifiers[group[0].group_uid]) for group in generate(self._engine, requests)]

    def _graded(self, group: tuple[Trajectory, ...], verifier: str) -> pa.RecordBatch:
        options = {"fallback": self._config.rollout.verifier.fallback} if verifier in ("math", "number") else {}
        rows = []
        for trajectory in group:
            text = self._text(trajectory.hard_ids, trajectory.finish_reason)
            verdict = grade(verifier, text, trajectory.gold_answer, **options)
            rows.append(
                dataclasses.replace(
                    trajectory,
                    run_id=self._run_id,
                    worker="in-process",
                    response_text=text,
                    parsed_answer=verdict.parsed,
                    reward=verdict.reward,
                    grade_reason=verdict.reason,
                )
            )
        return encode(rows, self._config.schema_k)


class PlainEngine:
    """The part of :class:`learner.zero_engine.ZeroEngine` that a rank needs, in plain torch with one rank."""

    def __init__(self, module: nn.Module, optimizer: OptimizerConfig):
        self.module, self._clip = module, optimizer.grad_clip
        self._max_bad, self._bad_in_a_row = optimizer.max_bad_updates, 0
        self.frozen = frozenset(n.removeprefix("model.") for n, p in module.named_parameters() if not p.requires_grad)
        self._trainable = [p for p in module.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(
            self._trainable,
            lr=optimizer.lr,
            betas=optimizer.betas,
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
            fused=True,  # as the ranks' on a CPU
        )

    def forward(self, *inputs: Any) -> Any:
        return self.module(*inputs)

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def step(self, lr: float) -> UpdateResult:
        norm = float(nn.utils.clip_grad_norm_(self._trainable, self._clip))
        applied = bool(np.isfinite(norm))
        if applied:
            for group in self._optimizer.param_groups:
                group["lr"] = lr
            self._optimizer.step()
        self._optimizer.zero_grad()
        self._bad_in_a_row = 0 if applied else self._bad_in_a_row + 1
        return UpdateResult(norm, applied, self._bad_in_a_row)

    def ensure_finite(self) -> None:
        if self._bad_in_a_row >= self._max_bad:
            raise LearnerDiverged(f"{self._bad_in_a_row} non-finite updates in a row; lower optimizer.lr")

    def save(self, folder: str | Path) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        torch.save({"module": self.module.state_dict(), "optimizer": self._optimizer.state_dict()}, _state(folder))

    def load(self, folder: str | Path) -> None:
        state = torch.load(_state(folder), weights_only=True)
        self.module.load_state_dict(state["module"])
        self._optimizer.load_state_dict(state["optimizer"])

    def full_parameters(
        self, bucket_bytes: int = 0, without: Collection[str] = (), device: str = "cpu"
    ) -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter in self.module.named_parameters():
            if name.removeprefix("model.") not in without:
                yield name.removeprefix("model."), parameter


def _state(folder: str | Path) -> Path:
    return Path(folder) / "state.pt"


class _OneRank:
    """A single rank in this process, with the interface of `learner.group.RankGroup` that the loops use."""

    def __init__(self, rank: RankActor, config: RunConfig, model: str | Path):
        if config.model.dtype != "float32":
            raise ConfigError(
                f"runner in_process trains in float32, got model.dtype {config.model.dtype}; set it to float32, or "
                "take the runner pipeline"
            )
        rank.config, rank.rank, rank.world, rank.model_folder, rank.device = config, 0, 1, str(model), "cpu"
        rank.engine = PlainEngine(*rank.build(load_policy_model(str(model))))
        self._only = rank

    def publish(self, version: int) -> Weights:
        return versioned(version, self._only.policy_parameters())

    def finished(self) -> bool:
        return True

    def save(self, folder: str | Path) -> None:
        self._only.save(str(folder))

    def load(self, folder: str | Path) -> None:
        self._only.load(str(folder))

    def export(self, folder: str | Path) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        self._only.export(str(folder))

    def close(self) -> None:
        pass


class InProcessLearner(_OneRank):
    """A learner of one rank in this process, for the controller."""

    def __init__(self, config: RunConfig, model: str | Path):
        self._rank = LearnerRank()
        super().__init__(self._rank, config, model)

    def start_step(self, batch: pa.RecordBatch, step: int) -> None:
        self._report = self._rank.train_step(batch, step)

    def finish_step(self) -> dict[str, float]:
        return summarize([self._report]).metrics

    def replay(self, batch: pa.RecordBatch) -> ReplayReport:
        return summarize_gaps([self._rank.replay(batch)])


class InProcessSFT(_OneRank):
    """A learner of Latent-SFT of one rank in this process."""

    def __init__(self, config: RunConfig, model: str | Path):
        self._rank = SFTRank()
        super().__init__(self._rank, config, model)

    def start_step(self, rows: list[SFTRow], step: int) -> None:
        self._report = self._rank.sft_step(rows, step)

    def finish_step(self) -> dict[str, float]:
        return merged([self._report])


@contextlib.contextmanager
def in_process_session(folder: RunFolder, config: RunConfig, reporter: Reporter) -> Iterator[Run]:
    """Starts a run like `deploy.run.session.run_session`, without Ray and with the pool in this process."""
    torch.set_num_threads(1)
    with MetricsWriter(folder.path, config.metrics.sinks) as metrics, one_rank_group():
        prepared = prepare(config, reporter, folder).placed(folder, config, reporter)
        pool = InProcessPool(config, prepared, folder.name)
        yield Run(folder, config, 0, reporter, metrics, prepared, pool)


@contextlib.contextmanager
def one_rank_group() -> Iterator[None]:
    """Makes a process group of this process alone, in which the rank's collectives do nothing."""
    if torch.distributed.is_initialized():
        yield
        return
    store = torch.distributed.HashStore()  # type: ignore[attr-defined]  # torch exports it without saying so
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def train_in_process(folder: RunFolder, config: RunConfig, reporter: Reporter) -> None:
    """Trains in this process; `folder` gets metrics, summary and model as from `latent-grpo train`."""
    if config.stop_on is not None:
        raise ConfigError("stop_on has no effect with runner in_process, whose arms take all their steps; remove it")
    began = time.monotonic()
    with in_process_session(folder, config, reporter) as run:
        base = run.initial if config.warm_start is None else warm_start(run, InProcessSFT)
        learner = InProcessLearner(config, base)
        controller = Controller(config, run.pool, learner, run.problems.requests)
        controller.begin()
        self_test(run, learner)
        if config.evaluation.at_start:
            evaluate(run, controller.gather, 0, "before")
        with reporter.phase(config.algorithm, config.steps) as advance:
            while controller.step < config.steps:
                result = controller.run_step()
                run.metrics.write(result.step, result.metrics)
                advance(result.step, f"reward {result.metrics['rollout/reward']:.3f}")
                every = config.evaluation.every
                if every and result.step % every == 0 and result.step < config.steps:
                    evaluate(run, controller.gather, result.step, f"step-{result.step}")
        if config.evaluation.at_end:
            evaluate(run, controller.gather, config.steps, "after")
        run.export(folder.model, learner.export)
        run.record(minutes=round((time.monotonic() - began) / 60, 2))


def start_in_process(folder: RunFolder, config: RunConfig, reporter: Reporter) -> None:
    """Runs the warm start of a suite (if the model has none yet) and its evaluation in this process."""
    with in_process_session(folder, config, reporter) as run:
        base = run.initial if config.warm_start is None else warm_start(run, InProcessSFT)
        run.pool.publish(versioned(0, load_model(base, config.model.dtype).named_parameters()))
        evaluate(run, partial(gather, run.pool), 0, "after")
