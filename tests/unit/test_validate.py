"""`validate` says what Latent-SFT will do, what a rank needs, and what is frozen, before anything starts."""

from __future__ import annotations

import json

import pytest

from latent_grpo.common.config import ConfigError, load_config
from latent_grpo.common.models import make_model, save_model
from latent_grpo.common.tasks.arithmetic import make_arithmetic_tokenizer
from latent_grpo.deploy.checks.evaluation_size import size_rows
from latent_grpo.deploy.checks.validate import evaluation_rows, memory_rows, sft_rows, training_rows, validate
from latent_grpo.deploy.run.preparation import check


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A model's folder with tied embeddings, and a file of twenty problems."""
    folder = tmp_path_factory.mktemp("given")
    tokenizer = make_arithmetic_tokenizer()
    new = load_config("quickstart", ["model.new.tie_embeddings=true"]).model.new
    save_model(folder / "model", make_model(new, tokenizer, 0), tokenizer)
    rows = [{"problem": f"{i % 11}+{i // 11}?", "answer": "7", "cot": "1+2=3;"} for i in range(20)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def config_of(given, *overrides: str, **warm_start):
    task = {"name": "rows", "path": str(given / "rows.jsonl"), "max_prompt_tokens": 10, "max_response_tokens": 14}
    settings = {"model": {"path": str(given / "model")}, "tasks": [task | {"verifier": "number"}], "k": 3}
    return load_config(settings | {"warm_start": {"compression": 3, **warm_start}}, list(overrides))


def test_the_size_of_latent_sft_is_said(given):
    config = config_of(given, max_steps=9, batch_size=6, evaluate_every=4, optimizer={"lr": 1e-4})
    found = dict(sft_rows(config, check(config).sft))
    assert found == {
        "Latent-SFT steps": "at most 9 of 6 rows: 54 rows, 3.0 times the 18 that the tasks have",
        "Latent-SFT learning rate": "0.0001, 50 steps of warm-up, then constant",
        "Latent-SFT tokens per step": "at most 144, prompts included",
        "Latent-SFT evaluation": "every 4 steps on 2 held-out problems",
    }
    assert dict(sft_rows(config, None))["Latent-SFT steps"] == "at most 9 of 6 rows: 54 rows"
    assert sft_rows(load_config("quickstart", ["warm_start=null"]), None) == []


def test_defaults_that_fit_a_given_model_are_said(given):
    found = dict(sft_rows(config_of(given), None))
    assert found["Latent-SFT learning rate"].startswith("2e-05, ")
    assert found["Latent-SFT defaults"] == (
        "warm_start.optimizer.lr 2e-05, warm_start.batch_size 64: those for a model that is given, not made"
    )


def test_memory_frozen_weights_and_the_end_of_thinking_are_said(given):
    rows = validate(config_of(given), files=True)
    found = dict(rows)
    assert found["frozen in RL"] == (
        "the input embeddings, and the output layer, which is tied to them (freeze_embeddings)"
    )
    for stage, size in (("Latent-SFT", 61), ("RL", 98)):
        assert found[f"memory of a learner rank, {stage}"].startswith(f"about {size} MiB: 2 weights, ")
    assert found["latent-end token"] == "20 ('</think>')"
    assert not [value for name, value in rows if name == "warning" and "do not fit" in value]


def test_the_memory_of_the_papers_model_is_said_where_it_is_not_here(given):
    """A start of seven billion parameters on one GPU of 80 GiB: by its settings, and as `validate` states it."""
    large = ["model.path=Qwen/Qwen2.5-Math-7B", "model.dtype=bfloat16", "learner.gradient_checkpointing=true"]
    large += ["learner.resources.num_gpus=1", "rollout.resources.num_gpus=1", "learner.tokens_per_microbatch=8192"]
    whole = dict(memory_rows(config_of(given, *large), None))
    lora = dict(memory_rows(config_of(given, *large, "warm_start.lora.rank=64"), None))
    assert "published sizes of Qwen2.5-Math-7B, since Qwen/Qwen2.5-Math-7B is not on this machine" in whole["memory"]
    name = "memory of a learner rank, Latent-SFT"
    assert [float(rows[name].split()[1]) for rows in (whole, lora)] == pytest.approx([156.0, 17.9], rel=0.02)
    assert lora["trained in Latent-SFT"] == "161,480,704 parameters of LoRA, of rank 64"
    assert lora["memory per GPU"].startswith("learner ")
    assert "memory of published weights" not in whole
    large += ["weights.transport=collective", "weights.backend=nccl"]
    staged = dict(memory_rows(config_of(given, *large), None))
    assert staged["memory of published weights"] == "at most 28.4 GiB of rank 0's GPU besides"
    rank, with_copies = (float(rows["memory per GPU"].split()[1]) for rows in (whole, staged))
    assert with_copies - rank == pytest.approx(28.4, abs=0.1)
    assert memory_rows(config_of(given, "model.path=some/model"), None) == [
        ("memory", "not estimated: some/model is not a folder on this machine")
    ]


@pytest.mark.parametrize("section", ["lora", "warm_start.lora"])
def test_layers_that_the_model_does_not_have_are_refused_before_a_run_begins(given, section):
    check(config_of(given, f"{section}.targets=[q_proj]"))
    with pytest.raises(ConfigError, match=r"no linear layers q_porj; it has down_proj, .*, v_proj"):
        check(config_of(given, f"{section}.targets=[q_porj, v_proj]"))
    with pytest.raises(ConfigError, match=rf"{section}\.targets"):
        config_of(given, f"{section}.targets=[]")


def test_a_rank_that_does_not_fit_this_machine_is_a_warning(given):
    config = config_of(given, "learner.ranks=1000000")
    (warning,) = [value for name, value in memory_rows(config, check(config).model) if name == "warning"]
    assert warning.startswith("1000000 learner rank(s) of 0 GiB do not fit into the ")
    assert "learner.tokens_per_microbatch (16,384)" in warning


def test_the_first_prompt_of_each_task_is_shown_in_full(given):
    found = dict(validate(config_of(given), files=True))
    assert found["first prompt of rows"] == "5 tokens, the last of them '+' '0' '?' '<think>':\n0+0?<think>"
    assert "prompt of rows" not in found
    assert dict(validate(config_of(given)))["prompt of rows"] == "(problem)<think>"


def test_a_missing_file_and_a_model_that_is_a_file_are_said(given, tmp_path):
    config = config_of(given, f"tasks.0.path={tmp_path}/none.jsonl")
    assert f"task rows: {tmp_path}/none.jsonl does not exist" in str([v for n, v in validate(config) if n == "warning"])
    (tmp_path / "m.gguf").touch()
    with pytest.raises(ConfigError, match=r"m\.gguf' is a file; give the .*folder.*convert\.py"):
        validate(config_of(given, f"model.path={tmp_path}/m.gguf"))


def test_what_is_evaluated_and_when_is_said():
    assert evaluation_rows(load_config("paper-high")) == [
        (
            "evaluation",
            "math500, aime2024, aime2025: before and after training on all problems, 5 repetition(s); every 10 steps "
            "on the first 64 problems of each task, at most 1 repetition(s)",
        )
    ]
    reference = load_config("paper-high", ["evaluation.protocol=reference"])
    assert "on all problems, the protocol's repetitions; every 10" in evaluation_rows(reference)[0][1]
    quiet = ["evaluation.at_start=false", "evaluation.at_end=false", "evaluation.every=0"]
    assert evaluation_rows(load_config("quickstart", quiet)) == []
    assert evaluation_rows(load_config("quickstart", ["evaluation.tasks=[]"])) == []


def test_the_samples_of_all_evaluations_are_counted_with_the_published_sizes():
    """Two rows of a high task by the protocol `reference`; 49 evaluations in 500 steps, since the last is the end's."""
    config = load_config("paper-high", ["evaluation.protocol=reference"])
    found = dict(size_rows(config, check(config, elsewhere=True, stored=False)))
    whole, interim = 2 * (4 * 500 + 64 * 60), 64 + 60
    assert "math500 by reference, noise on: 500 problems, 4 repetition(s); aime2024 by" in found["evaluation rows"]
    assert found["evaluation rows"].count("30 problems, 64 repetition(s)") == 4
    assert f"every 10 steps, 49 time(s): {interim} samples each" in found["evaluation samples"]
    samples = 2 * whole + 49 * interim
    assert found["all evaluations"].startswith(f"{samples:,} samples, at most {samples * (1024 + 4096):,} tokens")


def test_samples_that_both_protocols_use_count_once_and_an_unread_task_is_named(given):
    task = {"max_prompt_tokens": 10, "max_response_tokens": 14}
    tasks = [{"name": "svamp", "path": "svamp.parquet", "limit": 100} | task, {"name": "own", "path": "own.jsonl"}]
    both = [f"evaluation.tasks={json.dumps(tasks)}", "evaluation.protocol=both", "top_k=0", "steps=3"]
    config = config_of(given, *both, "evaluation.at_start=false", "model.path=some/model")
    found = dict(size_rows(config, check(config, elsewhere=True, stored=False)))
    assert found["all evaluations"] == (
        "500 samples, at most 12,000 tokens, prompts included; not counted, since not read: own"
    )


def test_how_often_the_steps_go_through_the_problems_is_said(given):
    config = config_of(given, "steps=10", "prompts_per_step=4", "minibatch_prompts=4")
    assert training_rows(config, check(config).sources.training) == [
        ("training on rows", "at least 40 prompts, 2.00 times its 20 problems")
    ]
