"""What the loop's benchmark counts, and what it makes of it; the loops themselves are stood for."""

from __future__ import annotations

import io
import json
from types import SimpleNamespace

import pytest
from rich.console import Console

from latent_grpo.deploy.bench.loop import WARM_UP, Comparison, LoopCost, cpu_seconds, show, timed_steps, write_json
from latent_grpo.deploy.run.progress import Reporter

PIPELINE = LoopCost(wall_s=3.0, rollout_s=2.0, learner_s=0.5, cpu_s=4.0, steps=7)
ALONE = LoopCost(wall_s=2.0, rollout_s=1.25, learner_s=0.75, cpu_s=1.6, steps=9)
FOUND = Comparison(pipeline=PIPELINE, in_process=ALONE, prompts=16, samples=128)


def timed(seconds, cpu):
    """A loop whose steps take these seconds; `cpu`: what all processes have used, at each asking."""
    clock, asked, written = [0.0], iter(cpu), []

    class Loop:
        step = 0

        def begin(self):
            clock[0] += 1000.0  # the start of a loop is not a step

        def run_step(self):
            spent, self.step = seconds[self.step], self.step + 1
            clock[0] += spent
            return SimpleNamespace(
                step=self.step, metrics={"time/rollout_wait_s": spent / 2, "time/learner_s": spent / 4}
            )

    run = SimpleNamespace(
        pool=None,
        reporter=Reporter(Console(quiet=True)),
        metrics=SimpleNamespace(write=lambda step, values: written.append(step)),
    )
    return timed_steps(run, Loop(), len(seconds), clock=lambda: clock[0], cpu_clock=lambda: next(asked)), written


def test_the_first_steps_are_run_and_not_counted():
    slow = [50.0] * WARM_UP
    cost, written = timed([*slow, 1.0, 8.0, 2.0, 3.0], cpu=[100.0, 110.0])
    assert written == list(range(1, WARM_UP + 5))
    assert cost == LoopCost(wall_s=2.5, rollout_s=1.25, learner_s=0.625, cpu_s=2.5, steps=4)


def test_one_slow_step_moves_no_median_but_the_mean_of_cpu_has_it():
    cost, _ = timed([*[1.0] * WARM_UP, 2.0, 2.0, 90.0], cpu=[0.0, 60.0])
    assert (cost.wall_s, cost.rollout_s, cost.learner_s, cost.cpu_s) == (2.0, 1.0, 0.5, 20.0)


def test_ratios_are_of_the_pipeline_to_one_process():
    assert (FOUND.wall_ratio, FOUND.cpu_ratio) == (1.5, 2.5)


def test_the_table_has_both_loops_and_their_ratios():
    console = Console(width=120, record=True, file=io.StringIO())
    show(FOUND, console)
    text = console.export_text()
    rows = {line.split("│")[1].strip(): line.split("│")[2:-1] for line in text.splitlines() if line.startswith("│")}
    assert "one step of 16 prompts, 128 samples" in text
    assert [cell.strip() for cell in rows["in one process"]] == ["2.000", "1.250", "0.750", "1.600", "9"]
    assert [cell.strip() for cell in rows["pipeline"]] == ["3.000", "2.000", "0.500", "4.000", "7"]
    assert [cell.strip() for cell in rows["pipeline / in one process"]] == ["1.50", "", "", "2.50", ""]


def test_the_file_holds_the_figures_and_the_ratios(tmp_path):
    write_json(FOUND, tmp_path / "loop.json")
    found = json.loads((tmp_path / "loop.json").read_text())
    assert found == {
        "pipeline": {"wall_s": 3.0, "rollout_s": 2.0, "learner_s": 0.5, "cpu_s": 4.0, "steps": 7},
        "in_process": {"wall_s": 2.0, "rollout_s": 1.25, "learner_s": 0.75, "cpu_s": 1.6, "steps": 9},
        "prompts": 16,
        "samples": 128,
        "wall_ratio": 1.5,
        "cpu_ratio": pytest.approx(2.5),
    }


def test_cpu_seconds_are_those_of_this_process_and_rise():
    before = cpu_seconds()
    sum(i * i for i in range(1_000_000))
    assert cpu_seconds() > before > 0
