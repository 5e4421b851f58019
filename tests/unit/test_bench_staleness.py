"""`bench staleness`: the simulated parts keep their times, and the loop on them is the product's."""

import dataclasses
import io
import json

import numpy as np
import pytest
from rich.console import Console

from latent_grpo.common.schema import encode
from latent_grpo.deploy.bench.figures import write_json
from latent_grpo.deploy.bench.staleness import (
    PROMPTS,
    ROWS,
    SAMPLES,
    Case,
    SleepingEngine,
    SleepingLearner,
    cases,
    lengths,
    run_case,
    show,
)


class InlinePool:
    """One worker without Ray or time: a poll is a decode step, and half of a group is right."""

    def __init__(self):
        self.engine, self.rows = SleepingEngine(decode_s=0.0), []

    def discard(self):
        self.engine.abort()

    def publish(self, publication):
        self.engine.load_weights(publication.manifest.version, ())

    def submit(self, requests):
        for request in requests:
            self.engine.add(request)

    def poll(self, timeout_s):
        ended = self.engine.step()
        self.rows += [t for group in ended for t in group]
        graded = [
            [dataclasses.replace(t, reward=float(t.hard_ids[0]), grade_reason="correct") for t in group]
            for group in ended
        ]
        return [encode(group, 1) for group in graded]


@pytest.mark.parametrize(("staleness", "window"), [(0, 0), (1, 0), (2, 8)])
def test_a_case_is_the_product_s_loop_on_the_simulated_parts(staleness, window, tmp_path):
    case = Case(name="tried", longest=30, max_staleness=staleness, batch_window=window)
    pool = InlinePool()
    found = run_case(pool, case, 3, SleepingLearner(0.0))
    assert 0 < found.wait_share <= 1
    assert 0 <= found.staleness_mean <= staleness + (window > 0)
    per_step = [t.group_uid for t in pool.rows]
    assert len(set(per_step)) * SAMPLES == len(per_step) >= (3 + 4 + staleness) * PROMPTS * SAMPLES
    console = Console(file=io.StringIO(), width=200, record=True)
    show([found], console)
    assert f"{found.wait_share:.1%}" in console.export_text()
    write_json([found], tmp_path / "found.json")
    assert json.loads((tmp_path / "found.json").read_text())[0]["case"]["max_staleness"] == staleness


def test_a_sample_lasts_as_long_as_its_uid_says_and_no_more_than_the_rows_run():
    pool, case = InlinePool(), cases()[0]
    run_case(pool, case, 1, SleepingLearner(0.0))
    asked = {}
    for sample in pool.rows:
        asked.setdefault(sample.group_uid, []).append(len(sample.hard_ids))
    every = [length for group in asked.values() for length in group]
    assert max(every) <= case.longest
    assert np.median(every) == pytest.approx(case.longest / 4, rel=0.3)
    assert len(set(every)) > 5
    engine = SleepingEngine(decode_s=0.0)
    requests = pool_requests(case)
    for request in requests:
        engine.add(request)
    engine.step()
    running = [len(left) for _, left in engine._running]  # how many it runs is the subject
    assert sum(running) <= ROWS
    assert lengths(requests[0]) == lengths(requests[0])


def pool_requests(case):
    seen = []

    class Asked(InlinePool):
        def submit(self, requests):
            seen.extend(requests)
            super().submit(requests)

    run_case(Asked(), case, 1, SleepingLearner(0.0))
    return seen


def test_every_staleness_is_measured_with_each_kind_of_rollouts_and_a_window_once():
    found = [(case.name, case.max_staleness, case.batch_window, case.in_flight) for case in cases()]
    assert len(found) == len(set(found)) == 12
    assert {("slow rollouts", 1, 8, False), ("slow rollouts", 4, 0, True)} <= set(found)
