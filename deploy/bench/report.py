"""A benchmark of reports: how fast one is written, and how fast it opens in a real Chromium.

The trajectories are generated, of a given size. The browser's own clock measures the time from the start of the
navigation until the page is usable and until the first curve is drawn, and the time of a search over all trajectories.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.table import Table

from latent_grpo.common.config import config_as_json, load_config
from latent_grpo.common.metrics import MetricsWriter
from latent_grpo.common.schema import encode
from latent_grpo.common.store import TrajectoryStore
from latent_grpo.common.terminal_text import TextConsole
from latent_grpo.common.types import SamplingSettings, Trajectory
from latent_grpo.deploy.bench.browser import chromium, open_report, wait_for
from latent_grpo.deploy.run.folder import RunFolder
from latent_grpo.deploy.view.report.build import write_report
from latent_grpo.deploy.view.run_view import open_run

if TYPE_CHECKING:
    from selenium.webdriver.remote.webdriver import WebDriver

GROUP, STEPS, SPOKEN, VOCABULARY = 8, 10, 40, 30_000


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportBenchmark:
    """The result of the benchmark; seconds are medians over `openings`."""

    trajectories: int
    latent_steps: int  # of each
    k: int
    write_s: float
    megabytes: float
    openings: int
    open_s: float
    open_worst_s: float
    first_curve_s: float
    search_s: float
    goal_open_s: float = 3.0


def measure(trajectories: int, latent_steps: int, k: int, openings: int, seed: int) -> ReportBenchmark:
    """Runs the benchmark. Raises ConfigError without Chromium."""
    with chromium() as browser, tempfile.TemporaryDirectory(prefix="latent-grpo-bench-") as folder:
        path = made_up_run(Path(folder) / "run", trajectories, latent_steps, k, seed).path
        began = time.perf_counter()
        report = write_report(open_run(path), limit=trajectories)
        write_s = time.perf_counter() - began
        opened, curves, searches = [], [], []
        for _ in range(openings):
            open_report(browser, report, "#/trajectories")
            opened.append(_mark(browser, "ready"))
            searches.append(browser.execute_script(SEARCH))
            open_report(browser, report)
            opened.append(_mark(browser, "ready"))
            browser.execute_script("document.querySelector('.plot').scrollIntoView()")
            wait_for(browser, "performance.getEntriesByName('drawn').length > 0")
            curves.append(_mark(browser, "drawn"))
        return ReportBenchmark(
            trajectories=trajectories,
            latent_steps=latent_steps,
            k=k,
            write_s=write_s,
            megabytes=report.stat().st_size / 2**20,
            openings=len(opened),
            open_s=float(np.median(opened)),
            open_worst_s=max(opened),
            first_curve_s=float(np.median(curves)),
            search_s=float(np.median(searches)),
        )


SEARCH = """
const field = document.querySelector("[name=q]"), began = performance.now();
field.value = "token 17";
field.dispatchEvent(new Event("input"));
document.body.getBoundingClientRect();
return (performance.now() - began) / 1000;
"""


def _mark(browser: WebDriver, name: str) -> float:
    return browser.execute_script("return performance.getEntriesByName(arguments[0])[0].startTime", name) / 1000


def made_up_run(path: Path, trajectories: int, latent_steps: int, k: int, seed: int) -> RunFolder:
    """Makes a run folder whose trajectories have random tokens and realistic weights."""
    folder, rng = RunFolder(path), np.random.default_rng(seed)
    path.mkdir(parents=True)
    task = {"name": "made-up", "path": "builtin:chain_arithmetic", "max_prompt_tokens": 64, "max_response_tokens": 64}
    config = load_config({"steps": STEPS, "k": k, "model": {"new": {}}, "tasks": [task]})
    (path / "config.json").write_text(config_as_json(config), encoding="utf-8")
    folder.write_json("run.json", {"lineage": 0})
    store = TrajectoryStore(folder.trajectories)
    groups = -(-trajectories // GROUP)
    with MetricsWriter(path) as metrics:
        for step in range(1, STEPS + 1):
            numbers = range((step - 1) * groups // STEPS, step * groups // STEPS)
            rows = [_trajectory(rng, step, g, i, latent_steps, k) for g in numbers for i in range(GROUP)]
            store.write(step, encode(rows, k))
            reward = float(np.mean([row.reward for row in rows])) if rows else 0.0
            metrics.write(step, {"rollout/reward": reward, "rollout/steps": latent_steps + SPOKEN, "time/step_s": 1.0})
    return folder


def _trajectory(rng: np.random.Generator, step: int, group: int, index: int, latent_steps: int, k: int) -> Trajectory:
    log_probs = -np.sort(rng.exponential(2.0, (latent_steps, k)).astype(np.float32), axis=1)
    noise = rng.uniform(0.0, 4.5, log_probs.shape).astype(np.float32)
    order = np.argsort(-(log_probs + noise), axis=1)
    reward = float(rng.random() < 0.5)
    return Trajectory(
        purpose="training",
        task="made-up",
        problem_uid=f"made-up/{group}",
        group_uid=f"training/{group}/made-up/{group}",
        sample_index=index,
        epoch=0,
        run_seed=0,
        policy_version_min=step - 1,
        policy_version_max=step - 1,
        engine="transformers",
        sampling=SamplingSettings(mode="latent", max_tokens=latent_steps + SPOKEN, k=k),
        prompt_ids=rng.integers(0, VOCABULARY, 100).astype(np.int32),
        latent_ids=rng.integers(0, VOCABULARY, log_probs.shape).astype(np.int32),
        latent_scores=np.take_along_axis(log_probs + noise, order, 1),
        latent_log_probs=np.take_along_axis(log_probs, order, 1),
        hard_ids=rng.integers(0, VOCABULARY, SPOKEN).astype(np.int32),
        hard_log_probs=-rng.exponential(0.5, SPOKEN).astype(np.float32),
        finish_reason="stop",
        response_text=" ".join(f"token {n}" for n in rng.integers(0, VOCABULARY, SPOKEN)),
        gold_answer="1",
        parsed_answer=str(int(reward)),
        reward=reward,
        grade_reason="correct" if reward else "wrong",
    )


def show(result: ReportBenchmark) -> None:
    """Prints the table of the command."""
    table = Table("", "", title="latent-grpo bench report", show_header=False)
    table.add_row("trajectories", f"{result.trajectories:,} of {result.latent_steps} latent steps, K {result.k}")
    table.add_row("written in", f"{result.write_s:.2f} s, {result.megabytes:.1f} MB")
    table.add_row("opens in", f"{result.open_s:.2f} s (worst of {result.openings}: {result.open_worst_s:.2f} s)")
    table.add_row("goal", f"{result.goal_open_s:g} s")
    table.add_row("first curve after", f"{result.first_curve_s:.2f} s")
    table.add_row("a search takes", f"{result.search_s:.3f} s")
    TextConsole().print(table)
