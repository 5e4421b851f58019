"""Every profile of the package is accepted, and says what the method's reference settings say (METHOD §5)."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from latent_grpo.common.config import ConfigError, PromptConfig, TaskConfig, load_config, profiles_folder
from latent_grpo.common.config.problems_and_model import BENCHMARK_DEFAULTS
from latent_grpo.common.models import make_model
from latent_grpo.common.prompts import PromptRenderer
from latent_grpo.common.tasks.arithmetic import make_arithmetic_tokenizer
from latent_grpo.common.tasks.benchmarks import prompt_of
from latent_grpo.common.tasks.sources import BENCHMARKS, load_task
from latent_grpo.deploy.checks.validate import resource_rows, validate
from latent_grpo.deploy.cli.app import app
from latent_grpo.deploy.data.sets import SETS
from latent_grpo.deploy.reproduce.suite import load_suite
from latent_grpo.deploy.run.preparation import check_engine
from latent_grpo.deploy.run.ray_session import needed_resources

ROOT = Path(__file__).resolve().parents[2]
PROFILES = sorted(path.stem for path in profiles_folder().glob("*.yaml"))


@pytest.mark.parametrize("name", PROFILES)
def test_validate_accepts_the_profile_on_a_machine_without_what_it_needs(name):
    result = CliRunner().invoke(app, ["validate", "--profile", name])
    assert result.exit_code == 0, result.output
    assert "prompts per step" in result.output


BENCHMARK_PROFILES = ["gsm8k-aug", "gsm-hard", "svamp", "multiarith", "math500", "aime2024", "aime2025", "gpqa"]


@pytest.mark.parametrize("gpus", [1, 8, 32, 64])
@pytest.mark.parametrize("name", [*BENCHMARK_PROFILES, "paper-low", "paper-high"])
def test_a_benchmark_has_counts_that_use_each_number_of_gpus_up(name, gpus):
    config = load_config(name, gpus=gpus)
    assert needed_resources(config)["GPU"] == gpus
    assert config.rollout.workers <= config.prompts_per_step
    assert config.samples_per_step >= config.learner.ranks
    resource_rows(config, cpus=16 * gpus, gpus=gpus)


def test_a_number_of_gpus_that_a_profile_does_not_know_is_refused_and_its_keys_give_way_to_overrides():
    with pytest.raises(ConfigError, match="--gpus 6: the profile has settings for 1, 8, 32, 64 GPUs"):
        load_config("svamp", gpus=6)
    assert load_config("svamp", ["rollout.workers=5"], gpus=8).rollout.workers == 5
    assert load_config("quickstart", gpus=6) == load_config("quickstart")  # it has no counts of its own
    with pytest.raises(ConfigError, match="sizes: expected a mapping of numbers of GPUs to settings"):
        load_config({"sizes": {"one": {}}}, gpus=1)


@pytest.mark.parametrize("chain", ["latent", "explicit"])
def test_validate_refuses_a_generated_chain_that_fills_no_latent_step(chain):
    short = ["warm_start.compression=7", "tasks.0.options.operations=1"]
    short += ["k=7"] if chain == "latent" else ["algorithm=grpo"]
    result = CliRunner().invoke(app, ["validate", "--profile", "quickstart", *short])
    if chain == "explicit":  # which has no latent steps
        assert result.exit_code == 0, result.output
    else:
        assert isinstance(result.exception, ConfigError)
        assert "problem chain-arithmetic/0: chain '" in str(result.exception)
        assert "has 6 token(s), fewer than one latent step stands for (warm_start.compression 7)" in str(
            result.exception
        )


def test_validate_reads_the_files_of_a_run_whose_model_is_elsewhere(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"problem": "1+1?", "answer": "2"}\n{"problem": "", "answer": "3"}\n')
    given = ["model.path=/of/another/machine", "model.new=null", "warm_start=null", f"tasks.0.path={path}"]
    config = load_config("quickstart", [*given, "tasks.0.options={}"])
    rows = validate(config, files=True)
    dropped = 'dropped 1 empty problem (row 1), for example row 1: {"problem": "", "answer": "3"}'
    assert ("problems", f"chain-arithmetic: 1 problem; {dropped}; the lengths of its prompts were not checked") in rows
    path.write_text('{"problem": "1+1?", "answer": ""}\n')
    with pytest.raises(ConfigError, match="none of the 1 rows"):
        validate(config, files=True)


def test_a_tokenizer_to_be_trained_is_judged_by_its_own_task_alone():
    """The first task's file is not read here: the second task's text would give another tokenizer."""
    second = {"name": "sums", "path": "builtin:chain_arithmetic", "verifier": "number"}
    config = load_config("gsm8k-small")
    other = config.model_copy(update={"tasks": [*config.tasks, TaskConfig.model_validate(second)]})
    alone, beside = (dict(validate(one))["vocabulary"] for one in (config, other))
    assert alone == beside
    assert alone.startswith(f"{config.model.new.vocab_size:,} rows")


def test_a_run_without_vllm_is_refused_where_it_would_start():
    with pytest.raises(ConfigError, match="vLLM is not installed here"):
        check_engine(load_config("gsm8k-aug", ["rollout.engine=vllm"]), installed=lambda: None)


def test_every_file_of_the_packages_is_installed_with_them():
    globs = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"][
        "latent_grpo.deploy"
    ]
    installed = {path for pattern in globs for path in (ROOT / "deploy").glob(pattern)}
    files = [p for p in (ROOT / "deploy").rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    assert [str(p) for p in files if p.suffix != ".py" and p not in installed] == []


def test_a_size_that_this_machine_does_not_have_is_said():
    rows = dict(resource_rows(load_config("quickstart", ["rollout.workers=100000"]), None, None))
    assert "lower rollout.workers" in rows["warning"]
    with pytest.raises(ConfigError, match=r"lower rollout\.workers"):
        resource_rows(load_config("quickstart", ["rollout.workers=100"]), 2, None)


def test_each_benchmark_has_a_profile_that_evaluates_it_alone():
    for name in BENCHMARKS:
        assert [task.name for task in load_config(name).evaluation.tasks] == [name]


@pytest.mark.parametrize("name", sorted(BENCHMARKS))
def test_benchmark_profile_agrees_with_the_benchmark(name):
    config = load_config(name)
    (task,) = config.evaluation.tasks
    assert {key: getattr(task, key) for key in BENCHMARK_DEFAULTS[name]} == BENCHMARK_DEFAULTS[name]
    assert prompt_of(task, config.model.prompt) == prompt_of(task, PromptConfig())


@pytest.mark.parametrize(
    ("name", "prompts", "mini", "kl", "masking", "budgets"),
    [("paper-low", 64, 16, 0.0, "include", (192, 128)), ("paper-high", 32, 32, 0.001, "exclude", (1024, 4096))],
)
def test_paper_settings(name, prompts, mini, kl, masking, budgets):
    config = load_config(name)
    assert (config.prompts_per_step, config.minibatch_prompts, config.group_size) == (prompts, mini, 8)
    assert (config.kl_coefficient, config.masking, config.component_weighting) == (kl, masking, "uniform")
    assert (config.optimizer.lr, config.k, config.noise.scale, config.noise.mode) == (1e-6, 10, 1.0, "one_sided")
    for task in (*config.tasks, *config.evaluation.tasks):
        assert (task.max_prompt_tokens, task.max_response_tokens) == budgets


@pytest.mark.parametrize(
    ("name", "steps", "data", "exits", "positions"),
    [
        ("paper-low", 10_000, "gsm8k-aug-oss-dup-all", "argmax_or_first", None),
        ("paper-high", 500, "dapo-math-17k-en", "first", 12_000),
    ],
)
def test_paper_runs(name, steps, data, exits, positions):
    """Length, data and intervals as the authors state them (METHOD §5), and files as `data fetch` leaves them."""
    config = load_config(name)
    assert (config.steps, config.evaluation.every, config.checkpoint.every) == (steps, 10, 40)
    assert (config.latent_exit, config.model.max_positions) == (exits, positions)
    assert [(task.name, task.path) for task in config.tasks] == [(data, f"data/{SETS[data].file}")]
    assert {task.path for task in config.evaluation.tasks} == {
        f"data/{SETS[task.name].file}" for task in config.evaluation.tasks
    }
    assert config.evaluation.interim
    assert config.evaluation.at_end
    assert load_suite(name).starts["latent"].path == config.model.path


def test_quickstart_fits_its_budget_and_holds_out_its_evaluation():
    config = load_config("quickstart")
    tokenizer = make_arithmetic_tokenizer()
    training, held_out = (load_task(task, config.seed) for task in (config.tasks[0], config.evaluation.tasks[0]))
    assert training.size is None
    assert held_out.size == 1024
    renderer = PromptRenderer(tokenizer, config.model.prompt)
    for source in (training, held_out):
        problem = source.problem(0)
        assert len(renderer.encode(problem)) <= source.config.max_prompt_tokens
        steps = -(-len(tokenizer.encode(problem.cot)) // config.warm_start.compression)
        visible = len(tokenizer.encode(f"</think>\\boxed{{{problem.answer}}}")) + 1
        assert steps + visible <= source.config.max_response_tokens
    asked = {training.problem(i).messages for i in range(2000)}
    assert not asked & {held_out.problem(i).messages for i in range(1024)}
    parameters = sum(p.numel() for p in make_model(config.model.new, tokenizer, config.seed).parameters())
    assert 400_000 < parameters < 450_000


def test_quickstart_also_runs_as_its_explicit_baseline():
    config = load_config("quickstart", ["algorithm=grpo", "tasks.0.max_response_tokens=44"])
    assert config.warm_start.chain == "explicit"
    assert not config.latent
