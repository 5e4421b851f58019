"""Settings: faults are refused with the key, the value and the remedy; algorithms are sets of defaults."""

import json

import pytest

from latent_grpo.common.config import (
    ALGORITHM_DEFAULTS,
    ConfigError,
    config_as_json,
    load_config,
    parse_config,
    parse_override,
    profiles_folder,
)


def settings(**changes):
    return {"model": {"path": "some/model"}, "tasks": [{"name": "a", "path": "a.jsonl"}], **changes}


def refused(data, *overrides):
    with pytest.raises(ConfigError) as caught:
        load_config(data, list(overrides))
    return str(caught.value)


@pytest.mark.parametrize("profile", sorted(p.stem for p in profiles_folder().glob("*.yaml")))
def test_every_profile_is_valid(profile):
    assert load_config(profile).tasks


def test_the_resolved_settings_resolve_to_themselves():
    config = load_config(settings())
    assert parse_config(json.loads(config_as_json(config))) == config


@pytest.mark.parametrize("algorithm", ALGORITHM_DEFAULTS)
def test_an_algorithm_is_its_defaults(algorithm):
    config = load_config(settings(algorithm=algorithm))
    for key, value in ALGORITHM_DEFAULTS[algorithm].items():
        assert (config.noise.mode if key == "noise.mode" else getattr(config, key)) == value


def test_an_explicit_value_wins_over_the_algorithm():
    assert load_config(settings(), ["flip=sign", "noise.mode=two_sided"]).noise.mode == "two_sided"
    assert load_config(settings(first_token=False)).first_token is False


@pytest.mark.parametrize("key", ["flip", "masking", "noise.mode"])
def test_off_needs_no_quotes(key):
    load_config(settings(), [f"{key}=off"])


def test_overrides_reach_nested_keys_and_list_items():
    config = load_config(settings(), ["optimizer.lr=3e-6", "tasks.0.path=b.jsonl", "rollout.resources.num_gpus=0.5"])
    assert (config.optimizer.lr, config.tasks[0].path, config.rollout.resources.num_gpus) == (3e-6, "b.jsonl", 0.5)


def test_an_override_does_not_change_its_source():
    source = settings(optimizer={"lr": 1e-5})
    load_config(source, ["optimizer.lr=1"])
    assert source["optimizer"] == {"lr": 1e-5}


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("group_sise=8", "group_sise: unknown key; did you mean group_size?"),
        ("rollout.worker=8", "rollout.worker: unknown key; did you mean workers?"),
        ("group_size=1", "group_size: Input should be greater than or equal to 2, got 1"),
        ("minibatch_prompts=24", "prompts_per_step (64) is not divisible by minibatch_prompts (24)"),
        ("tasks.3.path=x", "override tasks.3.path: expected an index below 1"),
        ("steps.x=1", "steps"),
        ("steps", "expected key=value"),
        ("max_staleness=1", None),
        ("optimizer.decay_steps=5", "no effect with optimizer.schedule constant"),
        ("tasks=[]", "at least one task"),
    ],
)
def test_a_fault_names_key_value_and_remedy(override, said):
    if said is None:
        load_config(settings(), [override])
    else:
        assert said in refused(settings(), override)


def test_nearest_valid_values_are_offered():
    assert "set minibatch_prompts to one of [8, 16, 32]" in refused(settings(minibatch_prompts=24))


def test_all_faults_are_told_at_once():
    message = refused(settings(group_size=1, steps=0, nope=1))
    assert len(message.splitlines()) == 3


def test_a_model_needs_exactly_one_source():
    assert "exactly one of `path` and `new`" in refused(settings(model={}))
    assert "got both" in refused(settings(model={"path": "x", "new": {}}))


def test_keys_without_effect_are_refused_for_grpo():
    assert "tau would have no effect" in refused(settings(algorithm="grpo", tau=0.5))
    assert "noise" in refused(settings(), "algorithm=grpo", "noise.scale=0.5")


def test_switching_a_profile_to_grpo_drops_its_latent_keys():
    config = load_config(settings(tau=0.5, k=3, warm_start={}), ["algorithm=grpo"])
    assert (config.latent, config.schema_k, config.warm_start.chain) == (False, 0, "explicit")


def test_another_algorithm_is_that_algorithm_on_every_profile():
    ours = load_config("quickstart")
    assert (ours.component_weighting, ours.centering_draws) == ("uniform", 8)
    soft = load_config("quickstart", ["algorithm=soft_grpo"])
    defaults = load_config(settings(), ["algorithm=soft_grpo"])
    for key in ("component_weighting", "flip", "first_token", "masking", "centering_draws"):
        assert getattr(soft, key) == getattr(defaults, key), key
    assert (soft.noise.mode, soft.noise.scale) == ("two_sided", 0.3), (
        "the scale is the task's, the mode the algorithm's"
    )
    assert load_config("paper-low", ["algorithm=soft_grpo"]).masking == "off"
    assert load_config("quickstart", ["algorithm=latent_grpo"]) == ours, "no change, nothing left out"
    assert load_config("quickstart", ["algorithm=soft_grpo", "centering_draws=4"]).centering_draws == 4


def test_task_names_are_distinct():
    task = {"name": "a", "path": "a.jsonl"}
    assert "names must be distinct" in refused(settings(tasks=[task, task]))


def test_deterministic_is_for_cpu_and_no_staleness():
    assert "CPU guarantee" in refused(settings(deterministic=True), "rollout.resources.num_gpus=1")
    assert "needs max_staleness 0" in refused(settings(deterministic=True, max_staleness=2))


def test_a_model_that_is_too_short_for_its_task_is_refused():
    assert "model.new.max_positions (64)" in refused(settings(model={"new": {"max_positions": 64}}))


def test_a_missing_profile_names_the_known_ones():
    assert "quickstart" in refused("quickstrat")


def test_a_profile_may_extend_another(tmp_path):
    (tmp_path / "mine.yaml").write_text("extends: quickstart\nsteps: 3\noptimizer: {lr: 0.5}\n")
    mine, base = load_config(tmp_path / "mine.yaml"), load_config("quickstart")
    assert (mine.steps, mine.optimizer.lr) == (3, 0.5)
    assert mine.optimizer.betas == base.optimizer.betas


def test_yaml_that_cannot_be_read_names_its_file(tmp_path):
    (tmp_path / "bad.yaml").write_text("steps: [1")
    assert "bad.yaml: not valid YAML" in refused(tmp_path / "bad.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    assert "expected a mapping" in refused(tmp_path / "list.yaml")


@pytest.mark.parametrize(
    ("text", "value"),
    [("a=1", 1), ("a=1e-6", 1e-6), ("a=true", True), ("a=x", "x"), ("a=[1, 2]", [1, 2]), ("a=", None)],
)
def test_override_values_are_yaml(text, value):
    assert parse_override(text) == (["a"], value)


def test_a_sink_is_a_known_name_or_an_import_path():
    base = {"model": {"path": "x"}, "tasks": [{"name": "t", "path": "t.jsonl"}]}
    assert (
        load_config({**base, "metrics": {"sinks": ["console", "my.sinks:Slack"]}}).metrics.sinks[1] == "my.sinks:Slack"
    )
    with pytest.raises(ConfigError, match=r"metrics: sinks: unknown \['tensorbord'\]; allowed: console, tensorboard"):
        load_config({**base, "metrics": {"sinks": ["tensorbord"]}})


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rollout.max_rows=4"], r"rollout.max_rows (4) is smaller than group_size (8)"),
        (["clip.dual=1.1"], "clip.dual (1.1) must be at least 1 + clip.high (1.2)"),
        (["model.dtype=bfloat16", "learner.zero_stage=0"], "set learner.zero_stage to 1"),
        (["optimizer.betas=[2,3]"], "optimizer.betas must be in [0, 1), got [2.0, 3.0]"),
        (["old_log_probs=behaviour", "max_staleness=1"], "behaviour needs max_staleness 0 and importance off"),
        (["importance_cap=3"], "importance_cap has no effect with importance off"),
        (["importance=truncate", "importance_floor=0.2"], "importance_floor has no effect with importance truncate"),
        (["noise.mode=off", "noise.scale=2"], "noise.scale has no effect with noise.mode off"),
        (["dynamic_sampling=drop", "max_dispatch_factor=3"], "max_dispatch_factor has no effect"),
        (["evaluation.sampled_problems=3"], "evaluation.sampled_problems has no effect with evaluation.samples 0"),
        (["tasks.0.prompt.think_end=</t>"], "set model.prompt.think_end"),
    ],
)
def test_what_would_only_fail_later_or_do_nothing_is_refused_at_once(overrides, message):
    assert message in refused(settings(), *overrides)


def test_a_new_model_must_hold_the_tasks_budgets_and_its_heads():
    new = {"path": None, "new": {"max_positions": 64, "hidden_size": 130, "num_heads": 4}}
    tasks = [{"name": "a", "path": "a.jsonl", "max_prompt_tokens": 60, "max_response_tokens": 60}]
    message = refused(settings(model=new, tasks=tasks))
    assert "model.new.max_positions (64) is smaller than the longest prompt plus response (120)" in message
    assert "hidden_size (130) is not divisible by num_heads (4)" in message


@pytest.mark.parametrize("quiet", [["noise.mode=off"], ["noise.scale=0"]])
def test_centering_without_noise_is_refused(quiet):
    with pytest.raises(ConfigError, match=r"centering_draws \(8\) needs noise"):
        load_config("quickstart", ["centering_draws=8", *quiet])


def test_in_flight_updates_are_read_from_where_the_key_was_and_the_new_key_goes_first():
    old = {"vllm": {"in_flight_updates": True, "eager": True}, "engine": "vllm"}
    read = load_config(settings(max_staleness=1, rollout=old))
    assert (read.rollout.in_flight_updates, read.rollout.vllm.eager) == (True, True)
    again = load_config(settings(max_staleness=1, rollout={**old, "in_flight_updates": False}))
    assert not again.rollout.in_flight_updates
    assert "in_flight_updates" not in read.rollout.vllm.model_dump()


@pytest.mark.parametrize("keys", [{"batch_window": 4}, {"batch_window": 65, "max_staleness": 1}])
def test_a_window_needs_staleness_and_is_no_larger_than_a_batch(keys):
    with pytest.raises(ConfigError, match=r"batch_window \(\d+\) can be at most prompts_per_step \(64\)"):
        load_config(settings(**keys))
    assert load_config(settings(max_staleness=1, batch_window=64)).batch_window == 64


@pytest.mark.parametrize(
    ("changes", "mode"),
    [
        ({}, "off"),
        ({"max_staleness": 1}, "truncate"),
        ({"importance": "mask"}, "mask"),
        ({"max_staleness": 2, "importance": "off"}, "off"),
    ],
)
def test_importance_weights_are_on_where_rollouts_are_stale(changes, mode):
    assert load_config(settings(**changes)).importance_mode == mode


def test_a_mask_needs_room_between_its_bounds():
    assert "importance_floor below importance_cap" in refused(settings(importance="mask", importance_cap=0.4))


def test_a_value_that_no_type_of_a_key_allows_is_one_line_that_names_the_key_alone():
    assert refused("quickstart", "evaluation.protocol=null") == (
        "evaluation.protocol: Input should be 'ours' or 'reference', got None; or Input should be 'both', got None"
    )


def test_a_key_with_a_line_break_in_it_does_not_break_the_line():
    assert refused(settings(**{"a\nb": 1})).startswith(r"'a\nb': unknown key")
    assert "\n" not in refused(settings(**{"a\nb": 1}))
