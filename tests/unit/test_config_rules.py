"""Rules of keys: each stands beside its key, and what they decide together is pinned here."""

import pytest

from latent_grpo.common.config import ALGORITHM_DEFAULTS, LATENT_ONLY_KEYS, OBJECTIVE_KEYS, RunConfig, load_config
from latent_grpo.common.config.resume import refused_changes
from latent_grpo.common.config.rules import Rule, keys_with, rules_of
from latent_grpo.deploy.reproduce.inputs import DECIDE_TOKENS

MAY_CHANGE = {
    "rollout.workers",
    "rollout.min_workers",
    "rollout.max_workers",
    "rollout.resources",
    "rollout.max_rows",
    "rollout.max_restarts",
    "rollout.device",
    "rollout.compile",
    "rollout.verifier.processes",
    "rollout.verifier.max_ungraded_share",
    "tasks.N.max_dropped_share",
    "model.dtype",
    "learner.ranks",
    "learner.zero_stage",
    "learner.resources",
    "learner.device",
    "learner.tokens_per_microbatch",
    "learner.logprob_chunk_tokens",
    "learner.gradient_checkpointing",
    "learner.offload",
    "learner.bucket_elements",
    "learner.overlap_communication",
    "learner.share_prompts",
    "learner.weight_bucket_bytes",
    "weights",
    "evaluation",
    "checkpoint",
    "dump",
    "metrics",
    "health",
    "deadlines",
    "ray",
    "runs_folder",
    "work_folder",
    "self_test_groups",
    "max_dispatch_factor",
    "max_recoveries",
    "run_name",
    "stop_on",
}
LAST_BIT = {
    "model.dtype",
    "rollout.resources.threads",
    "learner.resources.threads",
    "learner.ranks",
    "learner.zero_stage",
    "learner.tokens_per_microbatch",
    "learner.logprob_chunk_tokens",
    "learner.gradient_checkpointing",
    "learner.offload",
    "learner.bucket_elements",
    "learner.overlap_communication",
    "learner.share_prompts",
}
OBJECTIVE = {"noise.mode", "component_weighting", "flip", "first_token", "masking", "centering_draws"}
LATENT_ONLY = ("k", "tau", "noise", "latent_exit", "component_weighting", "flip", "learn_exit", "centering_draws")
TOKENS = {"algorithm", "k", "tau", "model", "warm_start", "tasks", "evaluation.tasks"}


@pytest.mark.parametrize(
    ("rule", "keys"),
    [
        (Rule.MAY_CHANGE, MAY_CHANGE),
        (Rule.LAST_BIT, LAST_BIT),
        (Rule.OBJECTIVE, OBJECTIVE),
        (Rule.LATENT_ONLY, set(LATENT_ONLY)),
        (Rule.TOKENS, TOKENS),
    ],
)
def test_the_keys_of_a_rule_are_these(rule, keys):
    assert set(keys_with(RunConfig, rule)) == keys


def test_every_rule_is_pinned_here():
    assert len(Rule) == 5


def test_the_public_names_hold_the_keys_of_their_rules():
    assert LATENT_ONLY_KEYS == LATENT_ONLY, "messages name the keys in this order"
    assert set(OBJECTIVE_KEYS) == OBJECTIVE
    whole = dict.fromkeys(("algorithm", "k", "tau", "model", "warm_start", "tasks"), True)
    assert whole | {"evaluation": {"tasks": True}} == DECIDE_TOKENS


@pytest.mark.parametrize("algorithm", ALGORITHM_DEFAULTS)
def test_what_an_algorithm_decides_belongs_to_the_objective(algorithm):
    assert ALGORITHM_DEFAULTS[algorithm].keys() <= set(OBJECTIVE_KEYS)


@pytest.mark.parametrize(
    ("key", "rules"),
    [
        ("rollout.resources.threads", {Rule.MAY_CHANGE, Rule.LAST_BIT}),
        ("rollout.resources.custom.tpu", {Rule.MAY_CHANGE}),
        ("evaluation.tasks.0.prompt.user", {Rule.MAY_CHANGE, Rule.TOKENS}),
        ("noise.mode", {Rule.OBJECTIVE, Rule.LATENT_ONLY}),
        ("verifiers.shaped.kind", set()),
        ("no.such.key", set()),
    ],
)
def test_a_key_has_the_rules_of_its_sections_too(key, rules):
    assert rules_of(RunConfig, key) == rules


def _changed(*overrides, **given):
    source = {"model": {"path": "some/model"}, "tasks": [{"name": "a", "path": "a.jsonl"}], **given}
    return load_config(source), load_config(source, list(overrides))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("learner.tokens_per_microbatch", 3),
        ("learner.ranks", 3),
        ("learner.zero_stage", 3),
        ("rollout.resources.threads", 3),
        ("model.dtype", "bfloat16"),
    ],
)
def test_a_deterministic_run_keeps_what_decides_the_last_bit(key, value):
    assert refused_changes(*_changed(f"{key}={value}")) == []
    (refused,) = refused_changes(*_changed(f"{key}={value}", deterministic=True))
    assert refused.startswith(f"{key}: ")


@pytest.mark.parametrize(
    ("override", "refused"),
    [
        ("temperature=0.7", "temperature: 0.6 -> 0.7"),
        ("tasks.0.path=b.jsonl", "tasks.0.path: 'a.jsonl' -> 'b.jsonl'"),
        ("rollout.verifier.time_limit_s=7", "rollout.verifier.time_limit_s: 5.0 -> 7.0"),
        ("model.dtype=bfloat16", None),
        ("steps=7", None),
        ("evaluation.tasks=[{name: b, path: b.jsonl}]", None),
        ("rollout.resources.custom={tpu: 1}", None),
    ],
)
def test_a_resumed_run_may_change_where_and_how_fast_only(override, refused):
    assert refused_changes(*_changed(override)) == ([] if refused is None else [refused])


@pytest.mark.parametrize(("optimizer", "refused"), [({}, []), ({"schedule": "linear"}, ["max_steps: 400 -> 7"])])
def test_a_latent_sft_may_be_shortened_where_the_learning_rate_does_not_depend_on_it(optimizer, refused):
    changed = _changed("warm_start.max_steps=7", warm_start={"optimizer": optimizer})
    assert refused_changes(*changed) == [f"warm_start.{key}" for key in refused]


def test_a_given_model_never_gets_the_defaults_of_a_toy():
    def sft(model, **keys):
        config = load_config({"model": model, "tasks": [{"name": "a", "path": "a.jsonl"}], "warm_start": keys})
        found = config.latent_sft
        return found.optimizer.lr, found.batch_size, found.induction.optimizer.lr, found.induction.batch_size, config

    new, given = {"new": {"max_positions": 4096}}, {"path": "some/model"}
    assert sft(new)[:4] == (3e-3, 192, 1e-3, 192)
    *values, config = sft(given)
    assert (values[:2], config.fitted_defaults) == ([2e-5, 64], {"optimizer.lr": 2e-5, "batch_size": 64})
    assert sft(given, source="induced")[:4] == (2e-5, 64, 2e-5, 64)
    # what a user sets is taken as it is, the default's own value too
    *values, config = sft(given, batch_size=192, optimizer={"lr": 3e-3})
    assert (values[:2], config.fitted_defaults) == ([3e-3, 192], {})
    *values, config = sft(given, optimizer={"warmup_steps": 5})
    assert (values[:2], config.latent_sft.optimizer.warmup_steps) == ([2e-5, 64], 5)
    again = load_config(config.model_dump(mode="json"))  # as a resume reads it
    assert (again.latent_sft.optimizer.lr, again.fitted_defaults) == (2e-5, {})
    assert sft(new)[:4] == (3e-3, 192, 1e-3, 192), "no default was changed for other runs"


def test_steps_stay_where_the_learning_rate_depends_on_them():
    assert refused_changes(*_changed("steps=7", optimizer={"schedule": "linear"})) == ["steps: 100 -> 7"]
    assert refused_changes(*_changed("steps=7", optimizer={"schedule": "linear", "decay_steps": 50})) == []
