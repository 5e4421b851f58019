"""What a run stores is what it was: settings that are written out and read again ask for nothing new."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from latent_grpo.common.config import ConfigError, RunConfig, config_as_json, load_config, parse_config
from latent_grpo.common.config.loading import profiles_folder
from latent_grpo.common.config.problems_and_model import BENCHMARK_DEFAULTS
from latent_grpo.common.config.rules import section_in
from latent_grpo.common.config.section import AsGiven, Section
from latent_grpo.common.model_chain import CHAIN_FILE
from latent_grpo.common.prompts import PromptConfig
from latent_grpo.common.tasks.benchmarks import prompt_of, prompt_of_messages
from latent_grpo.common.tasks.sources import load_task
from latent_grpo.deploy.evaluation.evaluate import evaluation_config
from latent_grpo.deploy.run.folder import RunFolder, create_run, open_run
from latent_grpo.deploy.run.older_settings import of_today
from latent_grpo.deploy.run.start_folder import placed

PLAIN = {"model": {"path": "m"}, "tasks": [{"name": "t", "path": "rows.jsonl"}]}
TASK = {"name": "t", "path": "rows.jsonl", "columns": {"problem": "q"}, "prompt": {"system": "Think."}}
KINDS = {
    "plain": PLAIN,
    "columns and prompt": {**PLAIN, "tasks": [TASK]},
    "a benchmark": {**PLAIN, "tasks": [{"name": "svamp", "path": "svamp.parquet"}]},
    "a benchmark with keys": {**PLAIN, "tasks": [{"name": "gpqa", "path": "x", "verifier": "math"}]},
    "grpo": {**PLAIN, "algorithm": "grpo"},
    "soft_grpo": {**PLAIN, "algorithm": "soft_grpo"},
    "a warm start": {**PLAIN, "warm_start": {}},
    "a warm start with LoRA": {**PLAIN, "warm_start": {"lora": {}, "source": "uniform"}},
    "RL with LoRA": {**PLAIN, "lora": {}, "optimizer": {"warmup_steps": 3}},
    "induced labels": {**PLAIN, "warm_start": {"source": "induced"}},
    "a new model": {
        "model": {"new": {"max_positions": 2048}},
        "tasks": [{"name": "a", "path": "builtin:chain_arithmetic"}],
    },
    "an evaluation": {**PLAIN, "evaluation": {"tasks": [{"name": "aime2024", "path": "x"}], "samples": 4}},
}
PROFILES = sorted(path.stem for path in profiles_folder().glob("*.yaml"))


def behaviour(config: RunConfig) -> dict:
    """What is computed from settings, and from which of their keys somebody has set."""
    tasks = [*config.tasks, *config.evaluation.tasks]
    return {
        "settings": config.model_dump(mode="json"),
        "columns": [task.columns.given for task in tasks],
        "prompts": [
            prompt_of(task, config.model.prompt, by).__dict__ for task in tasks for by in ("ours", "reference")
        ],
        "messages": [prompt_of_messages(task, config.model.prompt).__dict__ for task in tasks],
        "graded": [(task.verifier, task.max_prompt_tokens, task.max_response_tokens) for task in tasks],
    }


def source_of(name):
    return KINDS.get(name, name)


@pytest.mark.parametrize("name", [*KINDS, *PROFILES])
def test_settings_that_are_written_and_read_are_the_same(name):
    config = load_config(source_of(name))
    once = parse_config(json.loads(config_as_json(config)))
    twice = load_config(once.model_dump(mode="json"))
    assert behaviour(once) == behaviour(config)
    assert behaviour(twice) == behaviour(config)


@pytest.mark.parametrize("name", [*KINDS, *PROFILES])
def test_a_run_is_opened_again_and_its_model_evaluated_with_its_own_settings(name, tmp_path):
    config = load_config(source_of(name), [f"runs_folder={tmp_path}"])
    folder = create_run(config, "x")
    reopened, again = open_run(folder.path, [], "--resume")
    assert behaviour(again) == behaviour(config)
    (folder.path / "model").mkdir()
    (folder.path / "model" / CHAIN_FILE).write_text("{}")
    if config.evaluation.tasks:
        plan = evaluation_config(str(reopened.path / "model"), [])
        assert [task.model_dump() for task in plan.config.tasks] == [t.model_dump() for t in config.evaluation.tasks]


@pytest.mark.parametrize("layout", [{"problem": "1+1?", "answer": "2"}, {"problem": "1+1?", "solution": r"\boxed{2}"}])
def test_a_stored_task_reads_the_file_that_it_was_trained_on(layout, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps(layout) + "\n")
    given = {**PLAIN, "tasks": [{"name": "t", "path": str(rows)}], "runs_folder": str(tmp_path / "runs")}
    config = load_config(given)
    folder = create_run(config, "x")
    boxed = {"boxed": lambda text: "2" if "boxed" in text else None}
    first = load_task(config.tasks[0], 0, **boxed).problem(0)
    assert load_task(folder.config().tasks[0], 0, **boxed).problem(0) == first


@pytest.mark.parametrize("name", sorted(BENCHMARK_DEFAULTS))
def test_settings_of_earlier_versions_with_every_default_written_out_are_no_demands(name, tmp_path):
    """They wrote the defaults of any task for one that is a benchmark, and every name of a column."""
    task = {"name": name, "path": "x", "verifier": "math", "max_prompt_tokens": 1024, "max_response_tokens": 1024}
    columns = {"problem": "problem", "answer": "a", "cot": "cot", "solution": "solution"}
    stored = load_config(PLAIN).model_dump(mode="json") | {"tasks": [{**task, "columns": columns}]}
    Path(tmp_path, "config.json").write_text(json.dumps(stored))
    (found,) = RunFolder(tmp_path).config().tasks
    assert found.columns.given == {"answer": "a"}
    assert {key: getattr(found, key) for key in BENCHMARK_DEFAULTS[name]} == BENCHMARK_DEFAULTS[name]


def sections(model: type[Section] = RunConfig) -> set[type[Section]]:
    found = {model}
    for field in model.model_fields.values():
        if (below := section_in(field.annotation)) is not None:
            found |= sections(below[1])
    return found


def test_a_section_tells_a_key_that_is_set_from_its_default_only_if_it_is_written_as_given():
    """Elsewhere whether a key was set is lost in a file, so only defaults that are filled in may depend on it."""
    root = Path(__file__).resolve().parents[2]
    users = [
        str(path.relative_to(root))
        for folder in ("common", "reward", "rollout_workers", "learner", "deploy")
        for path in sorted((root / folder).rglob("*.py"))
        if "model_fields_set" in path.read_text(encoding="utf-8")
    ]
    assert users == [
        "common/config/learning.py",  # defaults for a given model, which are filled in and written out
        "common/config/problems_and_model.py",  # a benchmark's, filled in as well
        "common/config/section.py",  # AsGiven itself
        "common/tasks/layouts.py",  # columns, which are AsGiven
        "deploy/evaluation/evaluate.py",  # of a run's settings the noise scale is always set
        "deploy/reproduce/suite.py",  # a suite's file is not written out
    ]
    assert {section for section in sections() if issubclass(section, AsGiven)} == {
        PromptConfig,
        type(load_config(PLAIN).tasks[0].columns),
    }


@pytest.mark.parametrize(
    ("section", "wrong"),
    [
        (section, wrong)
        for section, valid in {"model": [], "evaluation": [{}], "tasks": [], "health": [{}]}.items()
        for wrong in ("x", 3, None, [], ["x"], {})
        if wrong not in valid
    ],
)
def test_settings_of_another_form_reach_the_check_that_says_so(tmp_path, section, wrong):
    """A foreign or damaged config.json: what prepares stored settings does not fail by itself."""
    valid = load_config("quickstart").model_dump(mode="json")
    parse_config(placed(of_today(valid), {"started_in": str(tmp_path)}))
    found = placed(of_today({**valid, section: wrong}), {"started_in": str(tmp_path)})
    assert found[section] in (wrong, {"new": None})
    with pytest.raises(ConfigError, match=section):
        parse_config(found)
