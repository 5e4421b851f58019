"""The benchmark `latent-grpo bench scale`: what a step costs as one of its sizes grows, and all others stay.

    engine ──► trajectories of random weights ──► a rank's step ──► the dump, written and read

Each case is one step in a process of its own with one thread, after a small one that warms up. The exponent of an axis
is the slope of log seconds over log size between its last two sizes: 1 is a straight line through the origin, below it
a constant part still weighs, above it something grows faster than the size. Two more axes have no model: simulated
workers (`deploy.planning.simulation`), and steps of a run, whose memory must not grow.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

from latent_grpo.common.terminal_text import TextConsole
from latent_grpo.deploy.bench.own_process import alone, peak_mib

MIB = 2**20
WARM_UP_STEPS = 50  # of a run, before its memory is looked at for the first time


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """A step: prompts, samples of each, response steps, of them latent, K, and the model's vocabulary."""

    prompts: int = 4
    samples: int = 4
    response: int = 32
    mode: Literal["latent", "visible"] = "latent"
    k: int = 4
    vocabulary: int = 512


BASE = Sizes()
WARM_UP = Sizes(prompts=1, samples=2, response=4, k=2, vocabulary=64)
LONG = Sizes(prompts=1, samples=2)
AXES: dict[str, list[Sizes]] = {
    "prompts": [replace(BASE, prompts=n) for n in (4, 16, 64)],
    "samples": [replace(BASE, samples=n) for n in (4, 16, 64)],
    "latent steps": [replace(LONG, response=n) for n in (512, 2048, 8192)],
    "visible steps": [replace(LONG, response=n, mode="visible") for n in (512, 2048, 8192)],
    "k": [replace(BASE, k=n) for n in (1, 8, 64)],
    "vocabulary": [replace(BASE, vocabulary=n) for n in (2_374, 18_992, 151_936)],
}
SIZE_OF = {"latent steps": "response", "visible steps": "response"}  # the field of an axis, where its name is another
WORKERS = (1, 8, 64)
HIDDEN, LAYERS, PROMPT = 64, 2, 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Of one case: CPU seconds of its parts, and the most memory of its process, with what Python and torch take."""

    size: int
    rollout_s: float
    learner_s: float
    dump_s: float  # written and read
    dump_mib: float
    peak_mib: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleBench:
    axes: dict[str, list[Cost]]
    driver: dict[int, float]  # groups a CPU second that the driver handles, by the number of simulated workers
    memory: dict[int, float]  # MiB that a process of a tiny run holds, by the steps that it has made


def measure(
    axes: dict[str, list[Sizes]] | None = None, workers: Sequence[int] = WORKERS, steps: int = 500
) -> ScaleBench:
    """Measures every case once; `steps` is the length of the run whose memory is looked at."""
    found = {}
    for axis, cases in (AXES if axes is None else axes).items():
        field = SIZE_OF.get(axis, axis)
        found[axis] = [Cost(size=getattr(sizes, field), **alone(_step, sizes)) for sizes in cases]
    return ScaleBench(
        axes=found,
        driver={count: alone(_driver_speed, count) for count in workers},
        memory=alone(_memory, [*range(WARM_UP_STEPS, steps, max((steps - WARM_UP_STEPS) // 3, 1)), steps]),
    )


def exponent(costs: Sequence[Cost], part: str) -> float:
    """The slope of log seconds over log size between the last two cases."""
    before, last = costs[-2:]
    return math.log(getattr(last, part) / getattr(before, part)) / math.log(last.size / before.size)


# --- in a process of its own ---------------------------------------------------------------------------------------


def _driver_speed(workers: int) -> float:
    from latent_grpo.deploy.planning.simulation import driver_speed

    return driver_speed(workers)


def _step(sizes: Sizes) -> dict[str, float]:
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="lg-bench-") as scratch:
        _costs(WARM_UP, Path(scratch, "warm-up"))
        return {**_costs(sizes, Path(scratch, "case")), "peak_mib": peak_mib()}


def _costs(sizes: Sizes, folder: Path) -> dict[str, float]:
    from latent_grpo.common.config import parse_config
    from latent_grpo.common.schema import encode
    from latent_grpo.common.store import TrajectoryStore
    from latent_grpo.deploy.bench.workload import Workload, bench_model, facts_of, load_own_weights, requests_of
    from latent_grpo.deploy.reproduce.in_process import InProcessLearner, one_rank_group
    from latent_grpo.rollout_workers.engine import generate
    from latent_grpo.rollout_workers.transformers_engine import TransformersEngine

    model = bench_model(sizes.vocabulary, HIDDEN, LAYERS, positions=PROMPT + sizes.response + 1)
    model.save_pretrained(folder / "model")
    engine = TransformersEngine(model, facts_of(model), max_rows=sizes.prompts * sizes.samples)
    load_own_weights(engine, model)
    prompts = np.random.default_rng(0).integers(2, sizes.vocabulary, (sizes.prompts, PROMPT)).astype(np.int32)
    lengths = np.full(sizes.prompts, sizes.response)
    work = Workload(name="scale", prompts=prompts, samples=sizes.samples, lengths=lengths)
    marks = [time.process_time()]

    groups = generate(engine, requests_of(work, sizes.mode, sizes.k))
    rows = [
        replace(sample, reward=float(place % 2), grade_reason="correct" if place % 2 else "wrong")
        for group in sorted(groups, key=lambda group: group[0].group_uid)
        for place, sample in enumerate(group)
    ]
    batch = encode(rows, sizes.k)
    marks.append(time.process_time())
    settings: dict[str, Any] = {
        "k": sizes.k, "group_size": sizes.samples,
        "prompts_per_step": sizes.prompts, "minibatch_prompts": sizes.prompts,
        "masking": "off", "model": {"path": str(folder / "model")},
        "tasks": [{"name": "bench", "path": "builtin:arithmetic"}],
    }  # fmt: skip
    with one_rank_group():
        learner = InProcessLearner(parse_config(settings), folder / "model")
        learner.start_step(batch, 0)
        marks.append(time.process_time())
    store = TrajectoryStore(folder / "trajectories")
    dump = store.write(1, batch)
    store.read(1)
    marks.append(time.process_time())
    names = ("rollout_s", "learner_s", "dump_s")
    seconds = {name: end - begin for name, (begin, end) in zip(names, pairwise(marks), strict=True)}
    return seconds | {"dump_mib": dump.stat().st_size / MIB}


def _memory(steps: Iterable[int]) -> dict[int, float]:
    """Runs the tiny loop in this process, and returns its resident memory after each of `steps`."""
    from latent_grpo.common.config import load_config
    from latent_grpo.deploy.bench.trl import Scattered
    from latent_grpo.deploy.controller import Controller
    from latent_grpo.deploy.reproduce.in_process import InProcessLearner, in_process_session
    from latent_grpo.deploy.run.folder import create_run
    from latent_grpo.deploy.run.progress import Reporter

    wanted = sorted(steps)
    with tempfile.TemporaryDirectory(prefix="lg-bench-") as scratch:
        settings = [f"steps={wanted[-1]}", f"runs_folder={scratch}/runs", "warm_start=null", "prompts_per_step=8"]
        settings += ["minibatch_prompts=8", "masking=off", f"tasks.0.verifier={Scattered.__module__}:Scattered"]
        config, reporter = load_config("quickstart", settings), Reporter(TextConsole(quiet=True))
        found = {}
        with in_process_session(create_run(config, "bench"), config, reporter) as run:
            controller = Controller(config, run.pool, InProcessLearner(config, run.initial), run.problems.requests)
            controller.begin()
            for step in range(1, wanted[-1] + 1):
                controller.run_step()
                if step in wanted:
                    found[step] = psutil.Process().memory_info().rss / MIB
    return found


def show(found: ScaleBench, console: Console | None = None) -> None:
    console = console or TextConsole()
    title = f"a step as one size grows (others: {asdict(BASE)}; D = {HIDDEN}, {LAYERS} layers, one thread)"
    table = Table("axis", "size", "rollout s", "learner s", "dump s", "dump MiB", "peak MiB", title=title)
    for axis, costs in found.axes.items():
        for cost in costs:
            seconds = (f"{cost.rollout_s:.2f}", f"{cost.learner_s:.2f}", f"{cost.dump_s:.3f}")
            table.add_row(axis, f"{cost.size:,}", *seconds, f"{cost.dump_mib:.2f}", f"{cost.peak_mib:,.0f}")
        parts = (f"{exponent(costs, part):.2f}" for part in ("rollout_s", "learner_s", "dump_s", "dump_mib"))
        table.add_row("", "exponent", *parts, "", end_section=True)
    console.print(table)
    speeds = ", ".join(f"{workers} workers {speed:,.0f}" for workers, speed in found.driver.items())
    console.print(f"groups a CPU second of the driver: {speeds}")
    console.print(f"MiB after steps: {', '.join(f'{step} {mib:,.0f}' for step, mib in found.memory.items())}")
