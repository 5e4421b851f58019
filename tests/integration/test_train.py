"""Whole runs on a real Ray with a real DeepSpeed: what a run leaves, and that it repeats and resumes bit for bit."""

import contextlib
import errno
import gc
import io
import json
import os
import re
import signal
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from rich.console import Console
from training import COMMON, WHOLE, tiny

from latent_grpo.common.config.stopping import STEP_METRICS
from latent_grpo.common.learner_record import decode_records, join
from latent_grpo.common.metrics import read_metrics
from latent_grpo.common.models import load_model, load_tokenizer
from latent_grpo.common.schema import TrajectoryBatch, decode
from latent_grpo.common.sinks import gauge_name
from latent_grpo.common.store import DumpError, LearnerStore, TrajectoryStore
from latent_grpo.deploy.controller import Controller
from latent_grpo.deploy.evaluation.evaluate import evaluate_model, evaluation_config
from latent_grpo.deploy.export.export import export
from latent_grpo.deploy.replay.recorded import RecordedError
from latent_grpo.deploy.replay.replay import replay
from latent_grpo.deploy.reproduce.in_process import train_in_process
from latent_grpo.deploy.run.folder import ResumeError, RunFolder, create_run
from latent_grpo.deploy.run.manifest import read_manifest
from latent_grpo.deploy.run.progress import Reporter
from latent_grpo.deploy.run.storage.copy import local_copy
from latent_grpo.deploy.train import resume, train
from latent_grpo.learner.best_checkpoint import best_checkpoint
from latent_grpo.learner.checkpoint import latest_checkpoint

pytestmark = pytest.mark.integration
SAME = ("group_uid", "sample_index", "policy_version_min", "latent_ids", "latent_scores", "latent_log_probs")
SAME += ("hard_ids", "hard_log_probs", "reward", "epoch", "finish_reason")


BY_STORE = "weights.transport=object_store"


def rows_of(folder, steps):
    """What was generated, step by step, in prompt order."""
    store = TrajectoryStore(folder.trajectories)
    return [store.read(step).select(SAME).to_pylist() for step in steps]


def weights_of(folder):
    return dict(load_model(folder.model).named_parameters())


def test_three_steps_and_three_more_are_six_bit_for_bit_with_any_workers_and_transport(whole, tmp_path):
    quiet = ("evaluation.at_start=false", "evaluation.at_end=false", "checkpoint.every=0")  # the last is always kept
    # `whole` is by shared memory, which `auto` takes on a machine's own Ray
    places = (f"runs_folder=file://{tmp_path}/store", f"work_folder={tmp_path}/here", "run_name=half")
    half = train(tiny(*COMMON, *quiet, *places, "steps=3", "rollout.workers=2", BY_STORE), "half")
    resumed = resume(half.path, ["steps=6", "rollout.workers=1", "weights.transport=collective"])

    for first, second in zip(rows_of(whole, range(1, 7)), rows_of(resumed, range(1, 7)), strict=True):
        assert first == second
    epochs = [{row["epoch"] for row in rows} for rows in rows_of(whole, range(1, 7))]
    assert {0, 1} in epochs[:3]
    assert max(epochs[5]) >= 2
    expected, found = weights_of(whole), weights_of(resumed)
    assert all(torch.equal(expected[name], found[name]) for name in expected)

    lines = [(row["step"], row["lineage"]) for row in read_metrics(resumed.path)]
    assert lines == [(1, 0), (2, 0), (3, 0), (4, 1), (5, 1), (6, 1)]
    losses = [[row["metrics"]["learner/loss"] for row in read_metrics(f.path)] for f in (whole, resumed)]
    assert losses[0] == losses[1]
    uploaded = local_copy(f"file://{tmp_path}/store/half", None, tmp_path / "cache")
    assert all(torch.equal(expected[name], found) for name, found in weights_of(RunFolder(uploaded)).items())
    # the first rollout after the resume is on the checkpoint's weights
    view = TrajectoryBatch(TrajectoryStore(resumed.trajectories).read(4))
    assert set(view.numbers("policy_version_min")) == set(view.numbers("policy_version_max")) == {3}
    with pytest.raises(ResumeError, match=r"group_size: 4 -> 8"):
        resume(half.path, ["group_size=8"])


@pytest.mark.slow  # tests/unit/test_interim_beside.py covers it without Ray, test_rollout_pool.py a worker that is lent
def test_an_evaluation_beside_the_steps_has_the_figures_of_one_that_waits_and_changes_no_step(whole, tmp_path):
    keys = (f"runs_folder={tmp_path}", "rollout.workers=2", "rollout.min_workers=2", "evaluation.blocking=false")
    beside = train(tiny(*WHOLE, *keys), "beside")
    figures = [[(r["step"], r["metrics"]) for r in read_metrics(f.path, kind="evaluation")] for f in (whole, beside)]
    assert figures[0] == figures[1]
    assert [step for step, _ in figures[1]] == [0, 4, 6]
    evaluated = [
        TrajectoryStore(f.trajectories).read(4, "evaluation").select(SAME).to_pylist() for f in (whole, beside)
    ]
    assert evaluated[0] == evaluated[1]
    expected, found = weights_of(whole), weights_of(beside)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.slow
def test_a_run_goes_on_with_other_ranks_and_another_stage(ray_session, tmp_path):
    quiet = ("evaluation.at_start=false", "evaluation.at_end=false")
    folder = train(tiny(*quiet, f"runs_folder={tmp_path}", "steps=2", "learner.zero_stage=1"), "half").path
    resumed = resume(folder, ["steps=3", "learner.ranks=2", "learner.zero_stage=3"])
    assert [(row["step"], row["lineage"]) for row in read_metrics(resumed.path)] == [(1, 0), (2, 0), (3, 1)]
    # the step of two ranks is also that of one, from the state that another stage left
    assert replay(folder, 3, ["learner.ranks=1", "learner.zero_stage=0"]).reproduced


@pytest.mark.slow  # test_learner.py takes a state through bfloat16 and back, without a run
def test_a_run_goes_on_in_bfloat16_and_comes_back(ray_session, tmp_path):
    quiet = ("evaluation.at_start=false", "evaluation.at_end=false", "health.max_log_prob_gap=auto")
    folder = train(tiny(*quiet, f"runs_folder={tmp_path}", "steps=2"), "half").path
    for steps, dtype, before in ((4, "bfloat16", "float32"), (6, "float32", "bfloat16")):
        reporter = Reporter(Console(file=io.StringIO(), width=300, record=True))
        resume(folder, [f"steps={steps}", f"model.dtype={dtype}"], reporter)
        said = reporter.console.export_text()
        assert (
            f"forward passes are in {dtype} from here on; the steps before this checkpoint were taken in {before}"
            in said
        )
        assert "self-test: learner and engine agree" in said
    assert [(row["step"], row["lineage"]) for row in read_metrics(folder)] == [
        (1, 0), (2, 0), (3, 1), (4, 1), (5, 2), (6, 2)
    ]  # fmt: skip
    assert json.loads((folder / "run.json").read_text())["dtypes"] == ["float32", "bfloat16", "float32"]
    assert replay(folder, 6, []).reproduced
    with pytest.raises(RecordedError, match=r"dumps of all steps between, taken in its own dtype .float32."):
        replay(folder, 5, [])  # the state after step 4 is gone, and step 4 was taken in bfloat16


@pytest.mark.slow  # tests/unit/test_lora.py has a step beside plain torch, without Ray
def test_a_run_with_lora_resumes_exactly_and_leaves_a_plain_model(ray_session, tmp_path):
    keys = ("evaluation.at_start=false", "evaluation.at_end=false", "lora={rank: 4, alpha: 8}", "kl_coefficient=0.1")
    common = (*COMMON, *keys, f"runs_folder={tmp_path}")
    expected = weights_of(train(tiny(*common, "steps=4"), "undisturbed"))
    half = train(tiny(*common, "steps=2"), "half")
    resumed = resume(half.path, ["steps=4"])
    found, initial = weights_of(resumed), dict(load_model(resumed.base_model).named_parameters())
    assert found.keys() == initial.keys() == expected.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    changed = {name for name in found if not torch.equal(found[name], initial[name])}
    assert changed == {name for name in found if "_proj" in name}
    assert replay(resumed.path, 4, []).reproduced
    export(resumed.path, str(tmp_path / "exported"), step=4)
    exported = dict(load_model(tmp_path / "exported").named_parameters())
    assert all(torch.equal(exported[name], found[name]) for name in found)


class HeldIn(Reporter):
    """The learner stands still in the step after `step`, where the signal arrives; it goes on `hold` seconds later."""

    def __init__(self, step, number, hold):
        super().__init__(Console(file=io.StringIO(), width=300, record=True))
        self.step, self.number, self.hold, self.held = step, number, hold, False

    @contextlib.contextmanager
    def phase(self, name, total, unit="steps"):
        def advance(completed, note=""):
            if name == "latent_grpo" and completed == self.step and not self.held:
                self.held = True  # a step's progress is shown more than once
                every = psutil.Process().children(recursive=True)
                (learner,) = [p for p in every if "LearnerRank" in " ".join(p.cmdline())]
                learner.suspend()
                threading.Thread(target=self.interrupt, args=(learner,)).start()

        yield advance

    def interrupt(self, learner):
        end = time.monotonic() + 120
        while time.monotonic() < end and not any(type(o) is Controller and o.learning for o in gc.get_objects()):
            time.sleep(0.2)
        os.kill(os.getpid(), self.number)
        time.sleep(self.hold)
        learner.resume()


@pytest.mark.slow  # tests/unit/test_stepping.py covers both signals without Ray
@pytest.mark.parametrize(
    ("number", "kept", "said"),
    [
        (signal.SIGINT, 3, r"the running step may take (2\d\d|300) s more \(deadlines.learner_s\)"),
        (signal.SIGTERM, 2, r"the running step did not end in time \(deadlines.terminate_s\) and is given up"),
    ],
)
def test_an_interrupt_in_a_long_step_loses_nothing_whole(whole, tmp_path, number, kept, said):
    """The step lasts longer than SIGTERM leaves; no checkpoint is due. Resumed, the run is the uninterrupted one."""
    quiet = ("evaluation.at_start=false", "evaluation.at_end=false", "checkpoint.every=0", "deadlines.terminate_s=0.1")
    reporter = HeldIn(step=2, number=number, hold=3.0)
    with pytest.raises(KeyboardInterrupt):
        train(tiny(*COMMON, *quiet, f"runs_folder={tmp_path}", "steps=6"), "held", reporter)
    (held,) = tmp_path.glob("held-*")
    text = reporter.console.export_text()
    assert re.search(said, text)
    assert f"the checkpoint of training step {kept} is complete" in text
    assert latest_checkpoint(held / "checkpoints").step == kept

    resumed = resume(held, ["deadlines.terminate_s=100"])
    lines = [(row["step"], row["lineage"]) for row in read_metrics(resumed.path)]
    assert lines == [(step, int(step > kept)) for step in range(1, 7)]
    for first, second in zip(rows_of(whole, range(1, 7)), rows_of(resumed, range(1, 7)), strict=True):
        assert first == second
    expected, found = weights_of(whole), weights_of(resumed)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.slow  # tests/unit/test_milestones.py holds when a run ends and what is kept, without Ray
def test_a_run_that_ends_on_a_metric_says_so_and_goes_on_when_told(ray_session, tmp_path):
    rule = "stop_on={metric: rollout/reward, above: -1, for: 2}"
    quiet = ("evaluation.at_start=false", "evaluation.at_end=false", "checkpoint.every=0")
    folder = train(tiny(*COMMON, *quiet, f"runs_folder={tmp_path}", "steps=4", rule), "ends")
    assert folder.read_json("summary.json")["stopped"].startswith("stopped at step 2: rollout/reward above -1 for 2")
    assert latest_checkpoint(folder.checkpoints).step == 2
    assert (folder.model / "config.json").is_file()

    reporter = Reporter(Console(file=io.StringIO(), width=300, record=True))
    resume(folder.path, [], reporter)
    assert "takes no further step; to go on, resume it with stop_on=null" in reporter.console.export_text()
    assert latest_checkpoint(folder.checkpoints).step == 2
    resume(folder.path, ["stop_on=null"])
    assert latest_checkpoint(folder.checkpoints).step == 4
    assert "stopped" not in folder.read_json("summary.json")


def test_what_a_run_leaves(whole):
    folder = whole
    assert folder.config() == tiny(*WHOLE, f"runs_folder={folder.path.parent}")
    assert set(folder.read_json("run.json")["versions"]) >= {"torch", "ray", "deepspeed", "transformers", "python"}
    summary = folder.read_json("summary.json")
    assert summary["before"].keys() == summary["after"].keys()
    assert "held-out/pass_at_1" in summary["after"]

    steps = [row["metrics"] for row in read_metrics(folder.path)]
    assert [m["learner/updates"] for m in steps] == [2] * 6
    assert all(0 < m["rollout/reward"] < 1 and m["learner/grad_norm"] > 0 for m in steps)
    assert all(m["learner/drift_max"] < 1e-3 for m in steps)
    kinds = [row["kind"] for row in map(json.loads, (folder.path / "metrics.jsonl").read_text().splitlines())]
    assert kinds.count("checkpoint") == 6  # each when it is whole, beside the steps
    expected = ["self_test", "evaluation", *["train"] * 4, "evaluation", *["train"] * 2, "evaluation"]
    assert [kind for kind in kinds if kind != "checkpoint"] == expected

    check_records(folder, steps)
    assert read_manifest(folder.path).model.keys() == {"initial", "trained"}
    shown = {f"ray_{gauge_name(name)}" for name in [*steps[0], "step"]}
    dashboard = (Path(__file__).parents[2] / "deploy/cluster/grafana-dashboard.json").read_text()
    assert set(re.findall(r"ray_latent_grpo_\w+(?={)", dashboard)) <= shown, "panels of metrics that no run has"
    trained = decode(TrajectoryStore(folder.trajectories).read(2))
    assert {t.policy_version_min for t in trained} == {1}
    assert all(t.run_id == folder.name and t.reward in (0.0, 1.0) and t.gold_answer for t in trained)
    evaluated = decode(TrajectoryStore(folder.trajectories).read(4, "evaluation"))
    assert {t.sampling.noise_mode for t in evaluated} == {"off"}

    assert set(STEP_METRICS) <= set(steps[0]), "a run may be told to end on these"
    best, _, score = best_checkpoint(folder.checkpoints)
    assert best.step in (4, 6)
    assert score == max(row["metrics"]["held-out/pass_at_1"] for row in read_metrics(folder.path, kind="evaluation")
                        if row["step"])  # fmt: skip

    # the model is an ordinary Hugging Face one, the last checkpoint's, and what the last evaluation judged
    assert latest_checkpoint(folder.checkpoints).step == 6
    load_tokenizer(folder.model)
    before, after = (dict(load_model(p).named_parameters()) for p in (folder.base_model, folder.model))
    assert any(not torch.equal(before[name], after[name]) for name in before)
    embedding = "model.embed_tokens.weight"
    assert torch.equal(before[embedding], after[embedding]), "embeddings are frozen"
    check_evaluation(folder, summary["after"]["held-out/pass_at_1"])


def check_evaluation(folder, last_pass_at_1):
    """`evaluate --model RUN/model`: the run's own settings and tasks, the last evaluation's figure, and pass@k."""
    config, name, _ = evaluation_config(str(folder.model), ["evaluation.samples=4"])
    (result,) = evaluate_model(config, name).tasks
    assert result.pass_at_1 == pytest.approx(last_pass_at_1)
    (evaluated,) = folder.path.parent.glob("evaluate-*")
    content = json.loads((evaluated / "evaluation.json").read_text())
    (task,) = content["tasks"]
    assert (task["task"], task["pass_at_1"]) == ("held-out", result.pass_at_1)
    assert [at["k"] for at in task["pass_at_k"]] == [1, 4]
    assert content["chain"].items() >= {"chain": "latent", "k": 3, "think_end": "</think>"}.items()
    rows = decode(TrajectoryStore(evaluated / "trajectories").read(0, "evaluation"))
    noisy = [t for t in rows if t.sampling.noise_mode == "one_sided"]
    assert (len(rows), len(noisy)) == (8 + 8 * 4, 8 * 4)
    right = {uid: sum(t.reward for t in noisy if t.problem_uid == uid) for uid in {t.problem_uid for t in noisy}}
    assert task["pass_at_k"][1]["value"] == pytest.approx(np.mean([n > 0 for n in right.values()]))


def check_records(folder, metrics):
    """What the learner made of each trajectory agrees with the trajectories and with the step's metrics."""
    for step, of_step in enumerate(metrics, start=1):
        batch, records = (
            s.read(step) for s in (TrajectoryStore(folder.trajectories), LearnerStore(folder.learner_records))
        )
        assert join(batch, records).tolist() == list(range(batch.num_rows))
        rows, losses = decode_records(records), {}
        for t, r in zip(decode(batch), rows, strict=True):
            if r.outcome == "filtered":
                assert r.reason == "all_equal"
                continue
            losses[r.update_index] = (r.update_loss, r.update_grad_norm)
            assert len(r.ratios) == t.num_steps
            assert np.allclose(r.ratios, np.exp(r.new_log_probs - r.old_log_probs), rtol=1e-5)
            assert np.allclose(r.step_advantages[1:], r.advantage)
            assert r.step_advantages[0] == (r.advantage if r.reason != "first_step" else 0.0)
            assert r.mean_old_log_prob == pytest.approx(r.old_log_probs.mean(), rel=1e-5)
            assert np.allclose(r.old_log_probs[-1:], t.hard_log_probs[-1:], atol=1e-3)
            if r.update_index == 0:
                assert np.array_equal(r.new_log_probs, r.old_log_probs)
                assert not r.clipped.any()
        winners = [r.group_uid for r in rows if r.winner]
        could_win = {
            t.group_uid for t, r in zip(decode(batch), rows) if t.finish_reason == "stop" and (r.advantage or 0) > 0
        }
        assert sorted(winners) == sorted(could_win), "one a group, if it has a valid sample above the mean"
        assert of_step["learner/loss"] == pytest.approx(np.mean([loss for loss, _ in losses.values()]))
        assert of_step["learner/grad_norm"] == pytest.approx(np.mean([norm for _, norm in losses.values()]))


@pytest.mark.parametrize("algorithm", ["grpo", "soft_grpo"])
def test_the_baselines_train_in_one_process(tmp_path, algorithm):
    config = tiny(f"runs_folder={tmp_path}", f"algorithm={algorithm}", "steps=2", "evaluation.runs=2")
    folder = create_run(config, algorithm)
    train_in_process(folder, config, Reporter())
    metrics = [row["metrics"] for row in read_metrics(folder.path)]
    assert all(np.isfinite(m["learner/loss"]) and m["learner/updates"] == 2 for m in metrics)
    latent = folder.read_json("summary.json")["after"]["held-out/latent_length"]
    assert (latent == 0) == (algorithm == "grpo")


@pytest.mark.slow  # the test above, and test_reproduce.py: both runners compute the same
@pytest.mark.parametrize("algorithm", ["grpo", "soft_grpo"])
def test_the_baselines_run_through_the_same_path(ray_session, tmp_path, algorithm):
    folder = train(tiny(f"runs_folder={tmp_path}", f"algorithm={algorithm}", "steps=2", "max_staleness=1"), algorithm)
    rows = decode(TrajectoryStore(folder.trajectories).read(2))
    assert all((len(t.latent_ids) == 0) == (algorithm == "grpo") for t in rows if t.finish_reason == "stop")
    metrics = [row["metrics"] for row in read_metrics(folder.path)]
    assert all(np.isfinite(m["learner/loss"]) and m["learner/updates"] == 2 for m in metrics)


@pytest.mark.slow  # test_dumps.py holds when the failure is raised, test_command.py what a run that breaks off leaves
def test_a_full_disk_stops_the_run_with_the_reason_and_leaves_the_last_checkpoint(ray_session, tmp_path, monkeypatch):
    write, written = TrajectoryStore.write, []

    def until_full(self, step, *arguments, **options):
        if step == 3:
            raise DumpError(errno.ENOSPC, "trajectories not dumped: the disk is full", str(self.folder))
        written.append(step)
        return write(self, step, *arguments, **options)

    monkeypatch.setattr(TrajectoryStore, "write", until_full)
    with pytest.raises(DumpError, match="the disk is full"):
        train(tiny(f"runs_folder={tmp_path}", "evaluation.at_start=false"), "full")
    (folder,) = tmp_path.iterdir()
    assert written == [1, 2]
    assert latest_checkpoint(folder / "checkpoints").step == 2
