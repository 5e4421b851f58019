"""Compositions: rewards add up, gates close, names resolve; a fault in the definition is one sentence."""

import asyncio
import re
from pathlib import Path

import pytest

from latent_grpo.common.config import ConfigError, RunConfig, load_config
from latent_grpo.reward.answers import gold_is_parsable, grade
from latent_grpo.reward.verifier import Definitions, Grade, UnknownVerifierError, load_verifier, settled
from latent_grpo.rollout_workers.verifiers import build_verifier, check_verifiers

TAGGED = {"kind": "format", "options": {"pattern": "<answer>.*</answer>"}}
SHORT = {"verifier": TAGGED, "free_chars": 9, "max_chars": 9, "penalty": 1}
HERE = "test_composition"


class Slow:
    """An `async` verifier: half a point for any answer."""

    def __init__(self) -> None:
        self.loops = set()

    async def grade(self, response_text: str, gold: str) -> Grade:
        await asyncio.sleep(0)
        self.loops.add(id(asyncio.get_running_loop()))
        return Grade(0.5, "correct", response_text)


class Broken:
    """Says itself that it failed."""

    def grade(self, response_text: str, gold: str) -> Grade:
        return Grade(None, "ungraded")


def weighted(*parts):
    return {"parts": [{**definition, "weight": weight} for definition, weight in parts]}


def test_a_weighted_sum_adds_rewards_and_keeps_the_first_parts_reason():
    options = weighted(({"kind": "number"}, 1.0), (TAGGED, 0.25), ({"kind": f"{HERE}:Slow"}, -0.5))
    assert grade("weighted_sum", r"<answer>\boxed{5}</answer>", "5", **options) == Grade(1.0, "correct", "5")
    assert grade("weighted_sum", r"<answer>\boxed{6}</answer>", "5", **options) == Grade(0.0, "wrong", "6")
    assert grade("weighted_sum", "five", "5", **options) == Grade(-0.25, "no_answer", None)


def test_a_part_that_is_ungraded_leaves_the_whole_ungraded():
    broken = {"kind": f"{HERE}:Broken"}
    assert grade("weighted_sum", r"\boxed{5}", "5", **weighted(({"kind": "number"}, 1.0), (broken, 0.1))).reward is None
    assert grade("gate", r"\boxed{5}", "5", condition=broken, then={"kind": "number"}).reward is None
    limits = {"free_chars": 0, "max_chars": 1, "penalty": 1.0}
    assert grade("length_penalty", r"\boxed{5}", "5", verifier=broken, **limits).reward is None


def test_the_format_is_a_well_formed_box_or_a_pattern_anywhere_across_lines():
    assert [grade("format", text, "").reward for text in (r"\boxed{x}", r"\boxed{", r"\boxed{}", "x")] == [1, 0, 0, 0]
    assert grade("format", "<answer>a\nb</answer> and", "", pattern="<answer>.*</answer>").reason == "correct"
    assert grade("format", "<answer>", "", pattern="<answer>.*</answer>") == Grade(0.0, "wrong")


@pytest.mark.parametrize(("length", "reward"), [(100, 1.0), (200, 1.0), (300, 0.75), (400, 0.5), (4000, 0.5)])
def test_the_length_penalty_rises_linearly_between_its_bounds(length, reward):
    options = {"verifier": {"kind": "number"}, "free_chars": 200, "max_chars": 400, "penalty": 0.5}
    text = r"\boxed{5}".rjust(length)
    assert grade("length_penalty", text, "5", **options) == Grade(reward, "correct", "5")


def test_a_gate_asks_its_verifier_only_when_the_condition_holds():
    options = {"condition": TAGGED, "then": {"kind": f"{HERE}:Slow"}, "closed_reward": -1.0}
    assert grade("gate", "<answer></answer>", "", **options).reward == 0.5
    assert grade("gate", "no tag", "", **options) == Grade(-1.0, "wrong")
    unanswered = {"condition": {"kind": "number"}, "then": {"kind": f"{HERE}:Slow"}}
    assert grade("gate", "no box", "5", **unanswered) == Grade(0.0, "no_answer")


def test_asynchronous_calls_share_one_event_loop():
    verifier = Slow()
    assert {settled(verifier.grade(text, "")).parsed for text in "abc"} == {"a", "b", "c"}
    assert len(verifier.loops) == 1


def test_a_gold_has_to_suit_every_part():
    parts = weighted(({"kind": "number"}, 1.0), ({"kind": "choice"}, 1.0))
    verifier = load_verifier("weighted_sum", **parts)
    assert not gold_is_parsable(verifier, "5")
    assert gold_is_parsable(load_verifier("gate", condition=TAGGED, then={"kind": "number"}), "5")


def test_defined_names_resolve_inside_compositions_with_the_defaults_of_their_kinds():
    definitions = {
        "lenient": {"kind": "number"},
        "strict": {"kind": "number", "options": {"fallback": "none"}},
        "shaped": {"kind": "weighted_sum", "options": weighted(({"kind": "lenient"}, 1.0), ({"kind": "strict"}, 0.5))},
    }
    verifier = Definitions(definitions, {"number": {"fallback": "last_number"}}).build("shaped")
    assert settled(verifier.grade("it is 5", "5")).reward == 1.0
    assert settled(verifier.grade(r"it is \boxed{5}", "5")).reward == 1.5


@pytest.mark.parametrize(
    ("definitions", "kind", "message"),
    [
        ({"a": {"kind": "b"}, "b": {"kind": "a"}}, "a", "defined by itself"),
        ({"a": {"kind": "gate", "options": {"condition": {"kind": "a"}, "then": {"kind": "a"}}}}, "a", "by itself"),
        ({"math": {"kind": "number"}}, "math", "other than choice"),
        ({"a": {"options": {}}}, "a", "a mapping with `kind`"),
        ({"a": {"kind": "numbr"}}, "a", "Unknown verifier 'numbr'. Allowed: .*, a, or the import path"),
        ({"a": {"kind": "weighted_sum", "options": {"parts": []}}}, "a", "at least one part"),
        ({"a": {"kind": "weighted_sum", "options": {"parts": [{"kind": "number"}]}}}, "a", "weight is None"),
        (
            {"a": {"kind": "weighted_sum", "options": {"parts": [{"kind": "number", "wieght": 1}]}}},
            "a",
            "weight is None",
        ),
        (
            {"a": {"kind": "weighted_sum", "options": {"parts": [{"kind": "number", "weight": 1, "bias": 1}]}}},
            "a",
            "unknown key 'bias'; allowed: kind, options, weight",
        ),
        ({"a": {"kind": "format", "options": {"pattern": "("}}}, "a", "no regular expression"),
        ({"a": {"kind": "format", "options": {"patern": "x"}}}, "a", "patern"),
        (
            {"a": {"kind": "length_penalty", "options": SHORT}},
            "a",
            r"free_chars \(9\) must be",
        ),
    ],
)
def test_a_wrong_definition_is_an_error_that_says_what_is_wrong(definitions, kind, message):
    with pytest.raises(UnknownVerifierError, match=message):
        Definitions(definitions).build(kind)


def config_with(verifiers: dict, verifier: str) -> RunConfig:
    task = {"name": "sums", "path": "builtin:chain_arithmetic", "verifier": verifier}
    return load_config({"model": {"path": "m"}, "tasks": [task], "verifiers": verifiers})


def test_a_profile_names_compositions_and_validate_builds_them():
    shaped = {"kind": "weighted_sum", "options": weighted(({"kind": "strict"}, 1.0), ({"kind": "format"}, 0.1))}
    strict = {"kind": "gate", "options": {"condition": TAGGED, "then": {"kind": "number"}}}
    config = config_with({"shaped": shaped, "strict": strict}, "shaped")
    assert check_verifiers(config) == {"shaped": ["sums"]}
    assert build_verifier(config, "shaped").grade(r"<answer>\boxed{5}</answer>", "5").reward == 1.1


def test_a_definition_that_no_task_uses_or_that_cannot_be_built_is_a_fault_of_the_profile():
    with pytest.raises(ConfigError, match=r"verifiers\.strict: no task uses it"):
        check_verifiers(config_with({"strict": TAGGED}, "number"))
    with pytest.raises(ConfigError, match="cannot be imported"):
        check_verifiers(config_with({"mine": {"kind": "no_such_module:Verifier"}}, "mine"))
    with pytest.raises(ConfigError, match="knd: unknown key"):
        config_with({"mine": {"knd": "number"}}, "mine")


def test_the_examples_of_the_documentation_work(tmp_path, importable):
    text = (Path(__file__).parents[2] / "docs" / "verifiers.md").read_text(encoding="utf-8")
    module, profile = (
        re.search(rf"```{language}\n({first}.*?)```", text, re.DOTALL)[1]
        for language, first in (("python", "# my_pkg"), ("yaml", "verifiers:"))
    )
    (tmp_path / "my_pkg").mkdir()
    (tmp_path / "my_pkg" / "my_mod.py").write_text(module)
    (tmp_path / "profile.yaml").write_text(f"model: {{path: m}}\n{profile}")
    importable(tmp_path)
    config = load_config(tmp_path / "profile.yaml")
    boxed = r"</think> \boxed{5}"
    assert build_verifier(config, "shaped").grade(boxed, "5") == Grade(1.1, "correct", "5")
    assert build_verifier(config, "brief").grade(boxed + " " * 1000, "5").reward == pytest.approx(
        1.1 - 0.5 * (len(boxed) + 500) / 1500
    )
    assert build_verifier(config, "gated").grade(boxed, boxed).reason == "correct"
    assert build_verifier(config, "gated").grade("5", "5").reward == 0.0
    assert build_verifier(config, "exact").grade(" 5", "5").reward == 0.0
