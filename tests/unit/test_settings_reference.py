"""`latent-grpo settings` and docs/settings.md: every key is there, with its sentence, as the models say it."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from latent_grpo.common import config
from latent_grpo.common.config import ALGORITHM_DEFAULTS, ConfigError, RunConfig, Section, load_config
from latent_grpo.common.config.reference import reference
from latent_grpo.common.config.reference_formats import as_json, as_markdown, as_text
from latent_grpo.common.config.rules import Rule
from latent_grpo.deploy.cli.app import app

PAGE = Path(__file__).resolve().parents[2] / "docs" / "settings.md"
SECTIONS = {section.name: section for section in reference()}
KEYS = {key.name: key for section in reference() for key in section.keys}


def names(prefix):
    return [key.name for section in reference(prefix) for key in section.keys]


def is_a_sentence(text):
    return text.endswith(".") and len(text.split()) >= 3


@pytest.mark.parametrize("name", KEYS)
def test_every_key_has_a_sentence(name):
    assert is_a_sentence(KEYS[name].text), f"{name}: write a sentence below the key, got {KEYS[name].text!r}"


@pytest.mark.parametrize("name", SECTIONS)
def test_every_section_has_a_sentence(name):
    assert is_a_sentence(SECTIONS[name].text), f"{name}: write the docstring of its class"


def test_every_section_class_has_a_docstring_of_its_own():
    classes = {model for name, model in vars(config).items() if isinstance(model, type) and issubclass(model, Section)}
    assert RunConfig in classes
    assert not [model.__name__ for model in classes if not is_a_sentence(model.__dict__["__doc__"] or "")]


def leaves(node, prefix=""):
    """The keys of a resolved configuration, with N and NAME as in the reference; a mapping of values is one key."""
    if prefix in KEYS:
        yield prefix
    elif isinstance(node, dict):
        for key, value in node.items():
            known = f"{prefix}.{key}".lstrip(".")
            yield from leaves(value, known if prefix != "verifiers" else "verifiers.NAME")
    elif isinstance(node, list):
        for value in node:
            yield from leaves(value, f"{prefix}.N")
    else:
        assert f"{prefix}." in "".join(f"{name}." for name in SECTIONS), f"{prefix} is neither a key nor a section"


def test_the_reference_has_every_key_of_a_resolved_configuration_and_no_other():
    # the keys of prompts and columns are written only where they are set
    prompt = {"system": "s", "user": "u {problem}", "format": "f {problem}", "think_start": "a", "think_end": "b"}
    columns = {"problem": "p", "answer": "a", "cot": "c", "solution": None}
    task = {"name": "a", "path": "a.jsonl", "prompt": prompt, "columns": columns}
    resolved = [
        load_config(
            {
                "model": model,
                "tasks": [task],
                "evaluation": {"tasks": [task]},
                "warm_start": {"lora": {}},
                "lora": {},
                "verifiers": {"mine": {"kind": "format"}},
                "stop_on": {"metric": "rollout/reward", "above": 0.9},
            },
            ["tasks.0.max_prompt_tokens=100", "tasks.0.max_response_tokens=100"],
        ).model_dump(mode="json")
        for model in ({"path": "some/model", "prompt": prompt}, {"new": {}, "prompt": prompt})
    ]
    assert {name for settings in resolved for name in leaves(settings)} == KEYS.keys()


@pytest.mark.parametrize(
    ("name", "kind", "default"),
    [
        ("steps", "whole number > 0", 100),
        ("top_p", "number > 0 and <= 1", 0.95),
        ("learner.zero_stage", "one of 0, 1, 2, 3", 2),
        ("warm_start.stop_at", "number >= 0 and <= 1, or null", None),
        ("optimizer.betas", "list of 2 items (number)", (0.9, 0.999)),
        ("warm_start.optimizer.betas", "list of 2 items (number)", (0.9, 0.98)),
        ("metrics.sinks", "list of items (text)", ["console"]),
        ("rollout.vllm.eager", "true or false, or null", None),
        ("tasks.N.options", "mapping of names to values (whole number, or number, or text, or true or false)", {}),
        ("verifiers.NAME.options", "mapping of names to values (any value)", {}),
    ],
)
def test_a_key_says_its_type_and_default(name, kind, default):
    assert (KEYS[name].type, KEYS[name].default) == (kind, default)


def test_a_key_without_a_default_is_required():
    assert {name for name, key in KEYS.items() if key.required} == {
        "tasks.N.name",
        "evaluation.tasks.N.name",
        "verifiers.NAME.kind",
        "stop_on.metric",
    }


def test_what_the_algorithm_decides_is_given_for_each_algorithm():
    found = {name: key.by_algorithm for name, key in KEYS.items() if key.by_algorithm}
    assert found == {
        name: {algorithm: values[name] for algorithm, values in ALGORITHM_DEFAULTS.items()}
        for name in ALGORITHM_DEFAULTS["latent_grpo"]
    }
    assert "default one_sided for latent_grpo; two_sided for soft_grpo; off for grpo" in as_text("noise.mode")


def test_a_key_has_the_rules_of_its_sections_in_words():
    assert KEYS["learner.resources.threads"].rules == (Rule.MAY_CHANGE, Rule.LAST_BIT)
    said = " ".join(as_text("health.window").split())
    assert said.endswith("This key may change when a run is resumed.")
    assert "resumed" not in as_text("temperature")


@pytest.mark.parametrize(
    ("prefix", "expected"),
    [
        ("optimizer.lr", ["optimizer.lr"]),
        ("tasks.0.weight", ["tasks.N.weight"]),
        ("tasks.N.columns", [f"tasks.N.columns.{name}" for name in ("problem", "answer", "cot", "solution")]),
        ("verifiers.shaped", ["verifiers.NAME.kind", "verifiers.NAME.options"]),
        ("checkpoint", ["checkpoint.every", "checkpoint.background", "checkpoint.keep", "checkpoint.keep_best"]),
        ("clip.", None),
        ("tasks.first.weight", None),
        ("rollout.work", None),
    ],
)
def test_a_prefix_is_a_section_or_a_key(prefix, expected):
    if expected is None:
        with pytest.raises(ConfigError, match="no key or section"):
            reference(prefix)
    else:
        assert names(prefix) == expected


@pytest.mark.parametrize(
    ("prefix", "nearest"),
    [
        ("lr", "optimizer.lr"),
        ("rollout.worker", "rollout.workers"),
        ("group_sise", "group_size"),
        ("evaluation.tasks.0.wieght", "evaluation.tasks.N.weight"),
        ("sft.compresion", "warm_start.compression"),
    ],
)
def test_an_unknown_prefix_names_the_nearest_keys(prefix, nearest):
    with pytest.raises(ConfigError, match=f"{prefix}.*nearest.*{nearest}"):
        reference(prefix)


def test_json_holds_every_key_once():
    found = json.loads(as_json())
    assert [key["key"] for key in found["keys"]] == list(KEYS)
    (lr,) = json.loads(as_json("optimizer.lr"))["keys"]
    assert (lr["default"], lr["type"], lr["rules"]) == (1e-6, "number > 0", [])
    (flip,) = json.loads(as_json("flip"))["keys"]
    assert flip["allowed"] == ["reference", "sign", "off"]
    assert flip["default_by_algorithm"]["grpo"] == "off"


def test_the_page_is_what_the_models_say():
    assert PAGE.read_text(encoding="utf-8") == as_markdown(), (
        "docs/settings.md is generated: run `latent-grpo settings --markdown > docs/settings.md`"
    )


def test_every_row_of_the_page_has_its_four_cells():
    rows = [line for line in as_markdown().splitlines() if line.startswith("|")]
    assert {row.replace("\\|", "").count("|") for row in rows} == {5}
    assert sum(row.startswith("| `") for row in rows) == len(KEYS)


def test_the_command_prints_the_reference():
    run = CliRunner().invoke
    assert run(app, ["settings", "--markdown"]).output == as_markdown()
    assert run(app, ["settings", "clip", "--json"]).output == as_json("clip")
    assert "clip.dual: number > 1; default 3.0" in run(app, ["settings", "clip"]).output
    assert isinstance(run(app, ["settings", "clips"]).exception, ConfigError)
    assert isinstance(run(app, ["settings", "--json", "--markdown"]).exception, ConfigError)
