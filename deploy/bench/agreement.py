"""`latent-grpo bench agreement`: how far engine and learner are apart on a run's model, in one process, without Ray.

It is the run's self-test with more groups and without limits. The tolerances of METHOD §6 were set from it
(docs/numerics.md).
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from latent_grpo.common.agreement import Gap, spacing
from latent_grpo.common.config import RunConfig
from latent_grpo.common.models import load_model
from latent_grpo.common.schema import TrajectoryBatch, encode
from latent_grpo.common.terminal_text import TextConsole
from latent_grpo.common.types import PolicyVersion
from latent_grpo.common.weights import checksum
from latent_grpo.deploy.bench import figures
from latent_grpo.deploy.run.folder import RunFolder
from latent_grpo.deploy.run.preparation import prepare
from latent_grpo.deploy.run.progress import Reporter
from latent_grpo.learner.batching import ReplayInputs, collate, group_indices, plan
from latent_grpo.learner.gaps import LogitSizes, compare, joined, summarize_gaps
from latent_grpo.learner.logprobs import chunk_size, step_log_probs
from latent_grpo.learner.policy import PolicyModule
from latent_grpo.rollout_workers.engine import generate
from latent_grpo.rollout_workers.factory import make_engine

SELF_TEST_GROUPS = 2  # self_test_groups of a run that does not set it


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """What was found; gaps are those of the self-test, `drift` is that of whole steps' log pi (METHOD §6)."""

    model: str
    dtype: str
    engine: str
    device: str
    groups: int
    samples: int
    steps: int  # response steps of all samples
    latent: Gap
    hard: Gap
    drift: Gap
    worst_mean: float  # of the latent gap, over self-tests of two of these groups each
    worst_p99: float
    largest_logit: float  # mean over steps
    seconds: float

    @property
    def spacing(self) -> float:
        """The distance of neighbouring numbers of the dtype at the size of the largest logits."""
        return spacing(self.dtype, self.largest_logit)


def measure(config: RunConfig, groups: int, reporter: Reporter | None = None) -> Agreement:
    """Generates the first groups of the run's prompts with its engine and computes their log-probs in its learner."""
    reporter, began = reporter or Reporter(), time.perf_counter()
    device = config.learner.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory(prefix="lg-bench-") as scratch:
        prepared = prepare(config, reporter).placed(RunFolder(Path(scratch)), config, reporter)
        model, facts = str(prepared.initial), prepared.model.facts
        policy = PolicyModule(load_model(model, config.model.dtype).to(device))  # type: ignore[arg-type]  # its own `to`
        weights = [(name, p.detach().cpu()) for name, p in policy.model.named_parameters()]
        engine = make_engine(config, model, facts)
        try:
            engine.load_weights(PolicyVersion(version=0, checksum=checksum(weights)), weights)
            requests = prepared.problems.requests(range(groups), "self_test")
            samples = [sample for group in generate(engine, requests) for sample in group]
        finally:
            engine.close()
    named = [dataclasses.replace(s, run_id="bench", worker="bench", response_text="", reward=0.0) for s in samples]
    view = TrajectoryBatch(encode(named, config.schema_k))
    numbers = group_indices(view.strings("group_uid"))
    drifts, latent, owners = [], [], []

    def forward(inputs: ReplayInputs, sizes: LogitSizes) -> torch.Tensor:
        log_probs: torch.Tensor = policy(inputs, sizes)
        weighting = config.objective.component_weighting
        ours, recorded = (step_log_probs(side, inputs, weighting=weighting) for side in (log_probs, inputs.behaviour))
        drifts.append((ours - recorded).abs())
        latent.append((log_probs - inputs.behaviour).abs()[inputs.latent])
        owners.append(numbers[inputs.batch_rows[inputs.latent].cpu().numpy()])
        return log_probs

    minibatches = plan(
        view.prompt_ids.lengths,
        view.num_steps,
        numbers,
        minibatch_prompts=int(numbers.max(initial=0)) + 1,
        ranks=1,
        tokens_per_microbatch=config.learner.tokens_per_microbatch,
        chunk_tokens=chunk_size(config.learner, facts.vocab_size),
    )
    found = compare(
        forward, (collate(view, m.sequences, m.chunks).to(device) for mini in minibatches for m in mini.ranks[0])
    )
    report = summarize_gaps([found])
    gaps, tests = torch.cat(latent).float().cpu().numpy(), np.concatenate(owners) // SELF_TEST_GROUPS
    alone = [Gap.of(gaps[tests == test]) for test in np.unique(tests)]
    return Agreement(
        model=str(config.model.path or "model.new"),
        dtype=config.model.dtype,
        engine=engine.name,
        device=device,
        groups=groups,
        samples=len(samples),
        steps=int(np.sum(view.num_steps)),
        latent=report.latent,
        hard=report.hard,
        drift=Gap.of(joined(drifts)),
        worst_mean=max((gap.mean for gap in alone), default=0.0),
        worst_p99=max((gap.p99 for gap in alone), default=0.0),
        largest_logit=report.largest_logit,
        seconds=time.perf_counter() - began,
    )


def show(found: Agreement, console: Console | None = None) -> None:
    """Prints the gaps as a table."""
    title = (
        f"{found.model}, {found.dtype}, {found.engine} engine, {found.device}: {found.samples} samples, largest logits "
        f"{found.largest_logit:.1f} ({found.dtype} spacing there {found.spacing:.2g})"
    )
    table = Table("|learner - engine|", "count", "mean", "p99", "max", title=title)
    for name, gap in (("latent", found.latent), ("hard", found.hard), ("log pi of steps", found.drift)):
        table.add_row(name, f"{gap.count:,}", *(f"{value:.2g}" for value in (gap.mean, gap.p99, gap.max)))
    console = console or TextConsole()
    console.print(table)
    console.print(
        f"latent gap of the worst self-test of {SELF_TEST_GROUPS} groups: mean {found.worst_mean:.2g}, p99 "
        f"{found.worst_p99:.2g}"
    )


def write_json(found: Agreement, path: Path) -> None:
    """Writes all figures."""
    figures.write_json(asdict(found) | {"spacing": found.spacing}, path)
