"""A suite as a user runs it: both runners give the same numbers, and an interrupted suite goes on where it was."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from training import PROFILE, TASK

from latent_grpo.common.models import load_model
from latent_grpo.deploy.reproduce.scheduler import SuiteFailed, reproduce
from latent_grpo.deploy.reproduce.suite import SuiteError
from latent_grpo.deploy.reproduce.unit import Request, run_unit

pytestmark = pytest.mark.integration
ROOT = Path(__file__).resolve().parents[2]
SUITE = {
    "title": "tiny", "seeds": [4], "probe_every": 1,
    "overrides": ["deterministic=true", "evaluation.samples=2", "steps=2"],
    "starts": {"latent": {"title": "start"}},
    "arms": {"mixture": {"title": "mixture", "start": "latent"}, "uniform": {
        "title": "uniform", "start": "latent", "overrides": ["component_weighting=uniform"]}},
    "claims": {"gain": {"text": "it gains", "test": {"kind": "difference", "arm": "mixture", "than": "latent"}}},
}  # fmt: skip


@pytest.fixture
def suite(tmp_path):
    profile = {**PROFILE, "warm_start": {"max_steps": 2, "batch_size": 4, "evaluation_problems": 4, "compression": 3}}
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(profile))

    def written(name="s", **changed):
        path = tmp_path / f"{name}.yaml"
        content = {**SUITE, "profile": str(tmp_path / "p.yaml"), **changed}
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        return path

    return written


@pytest.mark.slow  # `bench loop` and tests/unit/test_bench_loop.py compare the two as well
def test_both_runners_compute_the_same(ray_session, suite, tmp_path):
    found = {}
    for runner in ("pipeline", "in_process"):
        request = Request(source=str(suite(runner, runner=runner)), folder=tmp_path / runner)
        found[runner] = [run_unit(request, key) for key in ("latent-seed4", "mixture-seed4")]
    (start, arm), (start_alone, arm_alone) = found["pipeline"], found["in_process"]
    assert start.metrics == pytest.approx(start_alone.metrics)
    assert 0 < start.metrics["sampled_pass_at_1"] < 1, "rewards that differ, or equality would say little"
    evaluated = [[point["step"] for point in result.evaluations] for result in (arm, arm_alone)]
    assert evaluated == [[1, 2], [1, 2]], "each step once"
    assert [p["rollout/reward"] for p in arm.training] == [p["rollout/reward"] for p in arm_alone.training]
    assert arm.metrics["sampled_pass_at_1"] == pytest.approx(arm_alone.metrics["sampled_pass_at_1"])
    for unit in ("starts/latent-seed4/base", "runs/mixture-seed4/model"):
        ours, alone = (dict(load_model(tmp_path / r / unit).named_parameters()) for r in ("pipeline", "in_process"))
        assert all(torch.allclose(ours[name], alone[name], atol=2e-5) for name in ours)


def test_a_stopped_suite_goes_on_and_reports(suite, tmp_path):
    folder = tmp_path / "out"
    arms = {"mixture": SUITE["arms"]["mixture"]}
    path = suite(runner="in_process", arms=arms)
    command = [sys.executable, "-m", "deploy", "reproduce", str(path), "--folder", str(folder), "--parallel", "1"]
    paths = os.pathsep.join([str(Path(__file__).parent), str(ROOT)])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    first = folder / "starts" / "latent-seed4" / "result.json"
    end = time.monotonic() + 600
    while not first.is_file():
        assert process.poll() is None, process.stdout.read().decode()
        assert time.monotonic() < end
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert process.wait(300) == 130
    made = first.stat().st_mtime_ns
    assert json.loads((folder / "report.json").read_text())["complete"] is False

    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert first.stat().st_mtime_ns == made, "a finished unit was run again"
    report = json.loads((folder / "report.json").read_text())
    assert report["complete"]
    assert [row["name"] for row in report["arms"]] == ["latent", "mixture"]
    before, after = (row["each"]["4"] for row in report["arms"][:2])
    gain = after["pass_at_1"] - before["pass_at_1"]
    error = math.hypot(after["standard_error"], before["standard_error"])
    (claim,) = report["claims"]
    assert f"mixture - latent, pass_at_1: {gain:+.3f}" in claim["numbers"]
    assert claim["verdict"] == ("reproduced" if gain > 1.96 * error else "not reproduced")
    assert len(report["manifest"]["sessions"]) == 2
    assert all(len(points) == 3 for points in report["curves"].values())
    assert [point["step"] for point in report["masses"]["mixture"]] == [0, 1, 2]
    page = (folder / "report.html").read_text()
    assert "id='plotly'" in page
    assert "://" not in page.partition("id='plotly'")[0], "the page needs the network"
    assert "| it gains | paper |" in (folder / "report.md").read_text()

    with pytest.raises(SuiteError, match=r"another configuration: units.latent-seed4.steps: 2 -> 3;"):
        reproduce(Request(source=str(path), folder=folder, overrides=["steps=3"]))


@pytest.mark.slow  # test_suite.py: a child that ends without a result is named with its log's error
def test_a_unit_that_fails_is_named_with_its_reason_and_the_others_go_on(suite, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), str(ROOT)]))
    (tmp_path / "torn.jsonl").write_text('{"problem": "3+4?", "ans')
    broken = {**TASK, "path": str(tmp_path / "torn.jsonl")}  # to train on: a suite's check reads what is evaluated on
    arms = {"broken": {"title": "b", "start": "latent", "overrides": [f"tasks=[{json.dumps(broken)}]"]}}
    request = Request(source=str(suite(runner="in_process", arms=arms, claims={})), folder=tmp_path / "out")
    with pytest.raises(SuiteFailed, match=r"broken-seed4: .*torn.jsonl, line 1: not valid JSON"):
        reproduce(request, parallel=1)
    report = json.loads((request.folder / "report.json").read_text())
    assert [row["name"] for row in report["arms"]] == ["latent"]
