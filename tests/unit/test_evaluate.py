"""`latent-grpo evaluate`: whose settings it takes, what it asks for, and what it leaves, without a cluster."""

from __future__ import annotations

import dataclasses
import io
import json
import re

import numpy as np
import pytest
from rich.console import Console

from latent_grpo.common.config import ConfigError, load_config
from latent_grpo.common.encoding import TextEncoder
from latent_grpo.common.model_chain import ChainSettings, write_chain
from latent_grpo.common.schema import encode
from latent_grpo.common.tasks.arithmetic import make_arithmetic_tokenizer
from latent_grpo.common.tasks.benchmarks import BENCHMARKS
from latent_grpo.common.types import Trajectory
from latent_grpo.deploy.evaluation.evaluate import evaluation_config, measure, noise_line
from latent_grpo.deploy.evaluation.report import published, report, show, table
from latent_grpo.deploy.evaluation.scores import MACRO, TaskResult, macro_average
from latent_grpo.deploy.run.folder import create_run
from latent_grpo.deploy.run.problems import Problems, Sources
from latent_grpo.deploy.run.progress import Reporter

QUIET = Reporter(Console(quiet=True))


# --- settings


def model_of_a_run(tmp_path, *overrides):
    folder = create_run(load_config("quickstart", [f"runs_folder={tmp_path}", *overrides]), "mine")
    folder.model.mkdir()
    return folder.model


def test_a_run_s_model_is_evaluated_with_its_run_s_settings(tmp_path):
    config, name, _ = evaluation_config(str(model_of_a_run(tmp_path, "seed=7")), ["evaluation.runs=2"])
    assert (config.k, config.noise.scale, config.seed, config.evaluation.runs) == (3, 0.3, 7, 2)
    assert (config.model.path, config.model.new, config.warm_start) == (str(tmp_path / name / "model"), None, None)
    assert [t.name for t in config.tasks] == ["chain-arithmetic-held-out"], "training tasks are not loaded"


def test_a_verifier_of_the_training_tasks_alone_is_left_out_of_an_evaluation(tmp_path):
    """As unused it would be refused, and nothing grades with it."""
    shaped = {"kind": "weighted_sum", "options": {"parts": [{"kind": "number", "weight": 1.0}]}}
    model = model_of_a_run(tmp_path, f"verifiers.shaped={json.dumps(shaped)}", "tasks.0.verifier=shaped")
    config, _, _ = evaluation_config(str(model), [])
    assert config.verifiers == {}
    config, _, _ = evaluation_config(str(model), ["evaluation.tasks.0.verifier=shaped"])
    assert list(config.verifiers) == ["shaped"]


def test_what_ends_a_run_and_chooses_its_best_checkpoint_is_no_matter_of_an_evaluation(tmp_path):
    """They may name the run's tasks, and others are evaluated."""
    metric = "evaluation/chain-arithmetic-held-out/pass_at_1"
    keys = ("evaluation.every=5", f"checkpoint.keep_best={metric}", f"stop_on.metric={metric}", "stop_on.above=0.9")
    model = model_of_a_run(tmp_path, *keys)
    (tmp_path / BENCHMARKS["svamp"].files[0]).touch()
    config, _, _ = evaluation_config(str(model), [], tasks=["svamp"], data=str(tmp_path))
    assert (config.stop_on, config.checkpoint.keep_best) == (None, None)


def test_a_limit_takes_the_first_problems_of_every_task(tmp_path):
    for benchmark in BENCHMARKS.values():
        (tmp_path / benchmark.files[0]).touch()
    config, _, _ = evaluation_config(str(tmp_path), [], tasks=["svamp", "math500"], data=str(tmp_path), limit=12)
    assert [task.limit for task in config.evaluation.tasks] == [12, 12]
    config, _, _ = evaluation_config(str(model_of_a_run(tmp_path)), [], limit=3)
    assert [task.source.size for task in problems_of(config).evaluation] == [3]


def test_named_benchmarks_bring_prompt_grader_and_budget_and_the_chain_its_width(tmp_path):
    for benchmark in BENCHMARKS.values():
        (tmp_path / benchmark.files[0]).touch()
    chain = ChainSettings(
        chain="latent", k=4, tau=0.5, compression=2, think_end="</t>", think_end_ids=[9], latent_exit="first",
        prompt={"system": "Think."},
    )  # fmt: skip
    write_chain(tmp_path, chain)
    config, name, _ = evaluation_config(str(tmp_path), [], tasks=["svamp", "math500"], data=str(tmp_path))
    assert (name, config.algorithm, config.k, config.tau) == ("svamp-math500", "latent_grpo", 4, 0.5)
    assert (config.model.prompt.think_end, config.model.prompt.system) == ("</t>", "Think.")
    assert config.latent_exit == "first"
    assert [t.path for t in config.evaluation.tasks] == [
        str(tmp_path / "svamp.parquet"),
        str(tmp_path / "math500.parquet"),
    ]
    write_chain(tmp_path, ChainSettings(chain="explicit", think_end="</think>", think_end_ids=[]))
    config, _, _ = evaluation_config(str(tmp_path), [], tasks=["svamp"], data=str(tmp_path))
    assert config.algorithm == "grpo"


@pytest.mark.parametrize(
    ("in_its_run", "profile", "overrides", "line"),
    [
        (True, None, [], r"^pass@k is sampled with noise\.scale 0\.3 \(one_sided\), from run mine-.*$"),
        (True, None, ["noise.mode=two_sided"], r"^.*noise\.scale 0\.3 \(two_sided\), from run mine-.*$"),
        (True, None, ["noise.scale=0.5"], r"^.*noise\.scale 0\.5 \(one_sided\), from the command$"),
        (False, "quickstart", [], r"^.*noise\.scale 0\.3 \(one_sided\), from profile quickstart$"),
        (False, None, [], r"^\[yellow\].*noise\.scale 1 \(one_sided\), the default: .*give it as noise\.scale=\.\.\."),
        (False, None, ["noise.scale=0.5"], r"^.*noise\.scale 0\.5 \(one_sided\), from the command$"),
        (False, None, ["noise.mode=off"], None),
        (True, None, ["evaluation.samples=0"], None),
        (False, None, ["noise.scale=0.5", "evaluation.samples=0", "evaluation.protocol=both"], None),
    ],
)
def test_whose_noise_pass_at_k_has_is_one_line(tmp_path, in_its_run, profile, overrides, line):
    model, tasks = model_of_a_run(tmp_path), []
    if not in_its_run:  # moved out: its chain's file says K and tau, and no noise
        model = model.rename(tmp_path / "moved")
        write_chain(model, ChainSettings(chain="latent", k=4, tau=0.5, think_end="</t>", think_end_ids=[9]))
        (tmp_path / "svamp.parquet").touch()
        tasks = ["svamp"]
    config, _, noise = evaluation_config(
        str(model), ["evaluation.samples=4", *overrides], profile=profile, tasks=tasks, data=str(tmp_path)
    )
    said = noise_line(config, noise)
    assert said is None if line is None else re.match(line, said), said


def test_nothing_to_evaluate_on_says_what_to_give(tmp_path):
    with pytest.raises(ConfigError, match=r"give --tasks \(of gsm8k-aug"):
        evaluation_config(str(tmp_path), [])
    model = model_of_a_run(tmp_path)
    with pytest.raises(ConfigError, match=r"this is the folder of a run; give its trained model, .*, or export"):
        evaluation_config(str(model.parent), [])


def test_a_mistyped_model_is_said_before_its_chain_is_looked_for(tmp_path):
    (tmp_path / "svamp.parquet").touch()
    with pytest.raises(ConfigError, match=r"model '\./typo': it has no config\.json"):
        evaluation_config("./typo", [], tasks=["svamp"], data=str(tmp_path))


def test_pass_at_k_takes_the_usual_k_that_the_samples_allow():
    assert load_config("quickstart", ["evaluation.samples=20"]).evaluation.ks == [1, 4, 8, 16]
    assert load_config("quickstart").evaluation.ks == []
    stored = load_config("quickstart", ["evaluation.samples=20"]).model_dump(mode="json")  # as a run's config.json
    assert load_config(stored, ["evaluation.samples=4"]).evaluation.ks == [1, 4]
    with pytest.raises(ConfigError, match=r"pass@8 needs at least 8 samples per problem, evaluation.samples is 4"):
        load_config("quickstart", ["evaluation.samples=4", "evaluation.pass_at_k=[1, 8]"])


# --- what is asked


class Cluster:
    """Stands for the pool: sample i of problem p is right iff the table says so."""

    def __init__(self, right):
        self.right, self.requests = right, []

    def gather(self, requests, on_arrival):
        self.requests += requests
        groups = []
        for request in requests:
            problem = int(request.problem_uid.rpartition("/")[2])
            groups.append(encode([self._sample(request, problem, i) for i in request.sample_indices], k=3))
            on_arrival(len(groups))
        return groups

    def _sample(self, request, problem, index):
        noisy = request.sampling.noise_mode != "off"
        right = self.right(noisy, problem, index)
        return Trajectory(
            purpose=request.purpose, task=request.task, problem_uid=request.problem_uid, group_uid=request.group_uid,
            sample_index=index, epoch=0, run_seed=0, policy_version_min=0, policy_version_max=0, engine="none",
            sampling=request.sampling, prompt_ids=request.prompt_ids, latent_ids=np.zeros((2, 3), np.int32),
            latent_scores=np.zeros((2, 3), np.float32), latent_log_probs=np.zeros((2, 3), np.float32),
            hard_ids=np.zeros(3, np.int32), hard_log_probs=np.zeros(3, np.float32), finish_reason="stop",
            reward=float(right), grade_reason="correct" if right else "wrong",
        )  # fmt: skip


def problems_of(config):
    return Problems(config, Sources.read(config).prepared(config, TextEncoder(make_arithmetic_tokenizer())))


def evaluation_of(*overrides):
    config = load_config("quickstart", ["evaluation.tasks.0.options.size=4", *overrides])
    return config, problems_of(config)


def test_pass_at_1_is_asked_without_noise_and_pass_at_k_with_the_run_s():
    config, problems = evaluation_of("evaluation.runs=2", "evaluation.samples=4", "evaluation.sampled_problems=3")
    cluster = Cluster(lambda noisy, problem, index: index == 0 if noisy else problem < 2)
    kept = []
    (result,) = measure(config, cluster.gather, problems.evaluation, "t", reporter=QUIET, keep=kept.append).tasks
    assert result.pass_at_1 == 0.5
    assert result.runs == (0.5, 0.5)
    assert [(at.k, at.value, at.problems) for at in result.pass_at_k] == [(1, 0.25, 3), (4, 1.0, 3)]
    quiet, noisy = cluster.requests[:4], cluster.requests[4:]
    assert {(r.sampling.noise_mode, len(r.sample_indices)) for r in quiet} == {("off", 2)}
    assert {(r.sampling.noise_mode, len(r.sample_indices)) for r in noisy} == {("one_sided", 4)}
    assert len({r.group_uid for r in cluster.requests}) == 7, "a group is identified by its uid"
    assert sum(len(part) for part in kept) == 7


def test_trajectories_are_asked_for_and_given_away_in_parts():
    config, problems = evaluation_of("evaluation.runs=2")
    kept = []
    gather = Cluster(lambda *_: 1).gather
    measure(config, gather, problems.evaluation, "t", reporter=QUIET, keep=kept.append, at_once=4)
    assert [len(part) for part in kept] == [2, 2]


def test_an_evaluation_alone_is_no_training(tmp_path):
    config, _, _ = evaluation_config(str(model_of_a_run(tmp_path)), ["evaluation.tasks.0.options.size=4"])
    problems = problems_of(config)
    assert [line.split(":")[0] for line in problems.summaries] == ["evaluation chain-arithmetic-held-out"]


# --- what is left


def figures(task, problems=4, pass_at_1=0.5, protocol="reference", **more):
    return TaskResult(
        task=task, problems=problems, samples=problems, pass_at_1=pass_at_1, standard_error=0.1, interval=(0.3, 0.7),
        runs=(pass_at_1,), mean_reward=pass_at_1, chain_length=20.0, latent_length=12.0, invalid_rate=0.25, ungraded=0,
        protocol=protocol, **more,
    )  # fmt: skip


def whole(*names, **more):
    return [figures(name, BENCHMARKS[name].problems, **more) for name in names]


LOW, HIGH = ([n for n, b in BENCHMARKS.items() if b.level == level] for level in ("low", "high"))
OF_REFERENCE = f"{MACRO}/reference"


def test_published_numbers_stand_only_beside_the_same_benchmark():
    assert set(published(whole("math500"))) == {"math500/reference"}
    assert not published([figures("math500", problems=499)])  # a part of it is another benchmark
    assert not published(whole("math500", budget=512)), "and so is one whose samples are cut earlier"
    assert [p.pass_at_1 for p in published(whole(*LOW))[OF_REFERENCE]] == [50.46, 50.73, 57.98, 58.32]
    assert OF_REFERENCE not in published(whole(*LOW[:3]))
    assert OF_REFERENCE not in published(whole(*LOW, HIGH[0]))
    assert published(whole(*HIGH, budget=4096))[OF_REFERENCE][-1].pass_at_1 == 41.72


def test_published_numbers_stand_only_beside_figures_of_the_authors_protocol():
    assert published(whole(*HIGH, protocol="ours")) == {}
    noisy = whole(*HIGH, noise="one_sided")
    found = published([*whole(*HIGH, protocol="ours"), *whole(*HIGH), *noisy])
    assert {OF_REFERENCE, f"{OF_REFERENCE}-noise", "aime2024/reference", "aime2024/reference-noise"} < set(found)
    assert MACRO not in found
    assert "math500" not in found


def as_lists(node):
    """JSON has no tuples; everything else must be there as it was."""
    if isinstance(node, dict):
        return {key: as_lists(value) for key, value in node.items()}
    return [as_lists(item) for item in node] if isinstance(node, list | tuple) else node


def test_report_says_what_decided_the_numbers():
    config, problems = evaluation_of("evaluation.samples=4")
    results = measure(config, Cluster(lambda *_: 1).gather, problems.evaluation, "t", reporter=QUIET).tasks
    content = report(results, problems.evaluation, config, model="m", checksum="c", chain=None, versions={"torch": "2"})
    stored = json.loads(json.dumps(content, allow_nan=False))
    assert stored == as_lists(content), "the file says all that the report does, under the same names"
    content = stored
    (task,) = content["tasks"]
    assert [(at["k"], at["value"], at["problems"]) for at in task["pass_at_k"]] == [(1, 1.0, 4), (4, 1.0, 4)]
    assert task.items() >= {"pass_at_1": 1.0, "verifier": "number", "path": "builtin:chain_arithmetic"}.items()
    assert task["prompt"]["think_end"] == "</think>"
    assert content["settings"].items() >= {"k": 3, "runs": 1, "samples": 4, "temperature": 0.6}.items()
    assert content["macro_average"]["pass_at_1"] == 1.0


def test_table_shows_each_task_and_the_average():
    console = Console(width=80, record=True, file=io.StringIO())
    rows = whole("math500", "aime2024")
    rows[0] = dataclasses.replace(rows[0], pass_at_1=0.804, ungraded=2)
    show(console, table(rows, "a model"))
    text = console.export_text()
    assert len([line for line in text.splitlines() if "0.300-0.700" in line]) == 2, "nothing is folded in a log"
    for found in (
        "math500 (2 samples ungraded)",
        "0.804",
        "0.300-0.700",
        MACRO,
        "reference, noise off",
        "25.0%",
        "Latent-GRPO 80.40, pass@64 87.8",
    ):
        assert found in text
    assert f"{macro_average(rows).pass_at_1:.3f}" in text


def test_the_table_shows_rewards_only_where_they_say_something_else_than_pass_at_1():
    rows = whole("math500", "aime2024")
    console = Console(width=200, record=True, file=io.StringIO())
    show(console, table(rows, "a model"))
    assert "reward" not in console.export_text()
    show(console, table([dataclasses.replace(rows[0], mean_reward=0.625), rows[1]], "a model"))
    text = console.export_text()
    assert "reward" in text
    assert "0.625" in text
