"""`rollout.engine: auto` takes vLLM only where its CUDA build was proven, says why, and the run keeps what it said."""

import json

import pytest
from fake_run import fake_config

from latent_grpo.common.config import ConfigError, load_config
from latent_grpo.common.config.loading import profiles_folder
from latent_grpo.deploy.run.folder import create_run
from latent_grpo.deploy.run.manifest import read_manifest, write_manifest
from latent_grpo.deploy.run.preparation import check_engine
from latent_grpo.rollout_workers.engine_choice import choose_engine
from latent_grpo.rollout_workers.vllm_plugin.support import PROVEN_ON_CUDA


def settings(engine, gpus=0.0, **changes):
    return fake_config(rollout={"engine": engine, "resources": {"num_gpus": gpus}}, **changes)


@pytest.mark.parametrize(
    ("engine", "gpus", "proven", "taken", "why"),
    [
        ("transformers", 1.0, True, "transformers", "names it"),
        ("vllm", 0.0, False, "vllm", "names it"),
        ("auto", 0.0, True, "transformers", "no GPU"),
        ("auto", 1.0, False, "transformers", "not been run on a GPU"),
        ("auto", 1.0, True, "vllm", "proven"),
    ],
)
def test_auto_takes_vllm_only_on_gpus_and_only_once_it_is_proven(engine, gpus, proven, taken, why):
    choice = choose_engine(settings(engine, gpus), proven=proven)
    assert (choice.asked, choice.name) == (engine, taken)
    assert why in choice.why
    assert choice.sentence == taken if engine != "auto" else f"{taken} (rollout.engine auto: {choice.why})"


def test_a_deterministic_run_never_gets_vllm():
    choice = choose_engine(settings("auto", 1.0).model_copy(update={"deterministic": True}), proven=True)
    assert (choice.name, choice.why) == ("transformers", "vLLM's batches depend on timing")


def test_today_auto_is_transformers_everywhere_and_needs_no_vllm():
    assert not PROVEN_ON_CUDA, "docs/gpu.md must then name the card, and this test the new default"
    found = check_engine(settings("auto", 1.0), installed=lambda: None)
    assert found.startswith("transformers (rollout.engine auto: ")


def test_settings_of_vllm_are_refused_where_auto_does_not_take_it():
    with pytest.raises(ConfigError, match=r"rollout\.vllm has no effect with rollout\.engine auto"):
        load_config("paper-low", ["rollout.vllm.batched_tokens=1024"])


@pytest.mark.parametrize("profile", sorted(path.stem for path in profiles_folder().glob("*.yaml")))
def test_profiles_for_gpus_leave_the_engine_to_auto(profile):
    config = load_config(profile)
    if config.rollout.resources.num_gpus:
        assert config.rollout.engine == "auto"


def test_the_manifest_keeps_what_was_taken_and_why(tmp_path):
    config = settings("auto")
    folder = create_run(config, "x", tmp_path / "run")
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({}), encoding="utf-8")
    write_manifest(folder, config, 0, model, [])
    kept = read_manifest(folder.path).engine
    assert (kept.asked, kept.name, kept.why) == ("auto", "transformers", "its workers have no GPU")
