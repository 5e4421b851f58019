"""What the user gave wrong is said before Ray is touched, and a run that cannot begin leaves no folder."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from rich.console import Console

from latent_grpo.common.config import ConfigError, NewModelConfig, load_config, of_model
from latent_grpo.common.model_chain import CHAIN_FILE, ChainSettings, write_chain
from latent_grpo.common.models import make_model, save_model
from latent_grpo.common.tasks.arithmetic import make_arithmetic_tokenizer
from latent_grpo.common.types import Problem
from latent_grpo.deploy import single_service, train
from latent_grpo.deploy.evaluation import evaluate
from latent_grpo.deploy.run.folder import RunFolder
from latent_grpo.deploy.run.preparation import large_files, prepare
from latent_grpo.deploy.run.progress import Reporter
from latent_grpo.deploy.sft import loop as sft

TOKENIZER = make_arithmetic_tokenizer()
END_IDS = TOKENIZER.encode("</think>", add_special_tokens=False)
NEW = NewModelConfig(hidden_size=16, intermediate_size=32, num_layers=1, num_heads=2, max_positions=60)
OTHER = Problem(uid="t/0", task="t", messages=(("user", "1+23*4?"),), answer="9", cot="")
WARM = 'warm_start={"compression": 3}'


class RayTouched(Exception):
    """The session that stands for Ray was asked for."""


@pytest.fixture(autouse=True)
def no_ray(monkeypatch):
    def session(*_):
        raise RayTouched

    monkeypatch.setattr("latent_grpo.deploy.run.session.ray_session", session)


def reporter():
    return Reporter(Console(quiet=True))


def model_in(folder, **chain):
    save_model(folder, make_model(NEW, TOKENIZER, seed=0), TOKENIZER)
    settings = {"chain": "latent", "k": 3, "tau": 1.0, "compression": 3, "think_end": "</think>"}
    write_chain(folder, ChainSettings(**{**settings, "think_end_ids": END_IDS, **chain}))
    return folder


def rows_in(path, answers=("7",) * 12, cot="1+2=3;"):
    rows = [{"problem": f"{i}+1?", "answer": answer, "cot": cot} for i, answer in enumerate(answers)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def config_of(tmp_path, *overrides, model=None):
    start = of_model(model) if model else ["model.new.hidden_size=16", "model.new.num_heads=2"]
    return load_config("quickstart", [f"runs_folder={tmp_path / 'runs'}", *start, *overrides])


def stored(tmp_path, which, **rows):
    """Overrides that put a file in the place of a task's generated problems."""
    path = rows_in(tmp_path / f"{which.replace('.', '-')}.jsonl", **rows)
    return [f"{which}.path={path}", f"{which}.options={{}}"]


COMMANDS = {
    "train": lambda config: train.train(config, "x", reporter()),
    "sft": lambda config: sft.sft(config, "x", reporter()),
    "rollout-only": lambda config: single_service.rollout_only(config, "x", reporter()),
    "evaluate": lambda config: evaluate.evaluate_model(
        config.model_copy(update={"tasks": config.evaluation.tasks}), "x", reporter()
    ),
}
WARM_START = {"sft": [WARM]}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("chain", "overrides", "message"),
    [
        ({"think_end_ids": [1, 2]}, [], r"splits '</think>' into .* the model was trained with \[1, 2\]"),
        ({}, ["evaluation.tasks.0.max_response_tokens=40"], r"need 72 positions, model .* has 60"),
        ({}, ["evaluation.tasks.0.path=nowhere.jsonl"], r"nowhere\.jsonl does not exist"),
        ({}, ['evaluation.tasks.0.options={"operations": 6}'], r"evaluation task .* is endless; set its options\.size"),
    ],
)
def test_a_run_that_cannot_begin_leaves_nothing(tmp_path, command, chain, overrides, message):
    model = model_in(tmp_path / "model", **chain)
    config = config_of(tmp_path, *overrides, *WARM_START.get(command, []), model=model)
    with pytest.raises(ConfigError, match=message):
        COMMANDS[command](config)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_missing_answers_of_a_benchmark_are_said_before_anything_starts(tmp_path, command):
    file = stored(tmp_path, "evaluation.tasks.0", answers=["1", float("nan"), "3"])
    config = config_of(tmp_path, *file, *WARM_START.get(command, []), model=model_in(tmp_path / "model"))
    with pytest.raises(ConfigError, match=r"1 empty answer \(row 1\)"):
        COMMANDS[command](config)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("command", ["train", "rollout-only", "evaluate"])
def test_a_mixture_narrower_than_the_compression_is_said_before_anything_starts(tmp_path, command):
    config = config_of(tmp_path, model=model_in(tmp_path / "model", source="uniform", k=4, compression=4))
    with pytest.raises(ConfigError, match=r"k \(3\) is smaller than the model's compression \(4"):
        COMMANDS[command](config)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ([], True),
        ([WARM], False),  # it gets a chain of these settings
        (["algorithm=grpo", "tasks.0.max_response_tokens=28", "evaluation.tasks.0.max_response_tokens=28"], False),
    ],
)
def test_a_latent_model_that_does_not_say_its_chain_is_one_line(tmp_path, overrides, said):
    model = model_in(tmp_path / "[model]")
    console = Console(width=400, record=True, file=io.StringIO(), force_terminal=True, highlight=False)
    if not overrides:
        prepare(config_of(tmp_path, model=model), Reporter(console))
    assert CHAIN_FILE not in console.export_text()
    (model / CHAIN_FILE).unlink()
    prepare(config_of(tmp_path, *overrides, model=model), Reporter(console))
    lines = [line for line in console.export_text(styles=True).splitlines() if CHAIN_FILE in line]
    assert len(lines) == said
    for line in lines:
        assert line.startswith("\x1b[33m")
        assert f"model {model} has no {CHAIN_FILE}, so k (3), tau (1) and think_end ('</think>') could not" in line


@pytest.mark.parametrize("command", ["train", "sft"])
@pytest.mark.parametrize("made", [True, False])
def test_chains_that_cannot_be_learned_from_are_said_before_anything_starts(tmp_path, command, made):
    model = None if made else model_in(tmp_path / "model")
    bad = stored(tmp_path, "tasks.0", cot="3")
    with pytest.raises(ConfigError, match=r"no problem is left; dropped 12 chain of thought under"):
        COMMANDS[command](config_of(tmp_path, *bad, WARM, model=model))
    short = ("k=7", 'warm_start={"compression": 7}', "tasks.0.options.operations=1")
    with pytest.raises(ConfigError, match=r"problem chain-arithmetic/\d+: .* has 6 token\(s\).*compression 7"):
        COMMANDS[command](config_of(tmp_path, *short, model=model))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("command", ["train", "sft"])
def test_a_model_to_be_made_is_not_made_for_a_faulty_benchmark(tmp_path, command):
    file = stored(tmp_path, "evaluation.tasks.0", answers=["1", "null", None])
    with pytest.raises(ConfigError, match=r"1 empty answer \(row 2\); 1 unreadable gold answer \(row 1\)"):
        COMMANDS[command](config_of(tmp_path, *file))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_a_good_run_gets_its_folder_and_its_ray(tmp_path, command):
    config = config_of(tmp_path, *WARM_START.get(command, []), model=model_in(tmp_path / "model"))
    with pytest.raises(RayTouched):
        COMMANDS[command](config)
    assert len(list((tmp_path / "runs").iterdir())) == 1


def test_an_evaluation_says_whose_noise_it_samples_with(tmp_path):
    console = Console(width=400, record=True, file=io.StringIO())
    config = config_of(tmp_path, "evaluation.samples=4", model=model_in(tmp_path / "model"))
    with pytest.raises(RayTouched):
        evaluate.evaluate_model(config, "x", Reporter(console), "run [mine]")
    assert "pass@k is sampled with noise.scale 0.3 (one_sided), from run [mine]\n" in console.export_text()


def test_a_resumed_run_reads_its_problems_before_ray_too(tmp_path):
    file = rows_in(tmp_path / "rows.jsonl")
    config = config_of(tmp_path, f"tasks.0.path={file}", "tasks.0.options={}", model=model_in(tmp_path / "model"))
    with pytest.raises(RayTouched):
        COMMANDS["train"](config)
    (run,) = (tmp_path / "runs").iterdir()
    (tmp_path / "rows.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"rows\.jsonl does not exist; set its `path`"):
        train.resume(run, [], reporter())


@pytest.mark.parametrize("tokenizer", ["arithmetic", "bpe"])
def test_a_model_that_was_made_is_read_as_it_was_checked(tmp_path, tokenizer):
    """Prompts and token facts are the same from the model to be made and from its folder: a resumed run has those."""
    kind = [f"model.new.tokenizer={tokenizer}", "model.new.vocab_size=320", "warm_start=null"]
    config, folder = config_of(tmp_path, *kind, "tasks.0.max_prompt_tokens=64", "model.new.max_positions=256",
                               "evaluation.tasks.0.max_prompt_tokens=64"), RunFolder(tmp_path)  # fmt: skip
    before = prepare(config, reporter(), folder)
    assert before.model.source is None
    after = before.placed(folder, config, reporter())
    again = prepare(config, reporter(), folder)
    assert after.initial == again.initial == folder.base_model
    for problem in [*map(before.problems.training[0].source.problem, range(50)), OTHER]:
        ours, theirs = (parts.problems.training[0].prompt_ids(problem) for parts in (before, again))
        assert np.array_equal(ours, theirs)
    assert np.array_equal(before.model.facts.allowed, again.model.facts.allowed)
    for name in ("vocab_size", "latent_end_id", "eos_ids", "pad_id"):
        assert getattr(before.model.facts, name) == getattr(again.model.facts, name)


def test_a_large_file_is_said_before_it_is_read(tmp_path):
    large, small = tmp_path / "large.jsonl", tmp_path / "small.jsonl"
    large.write_bytes(b" " * 3 * 2**20)
    small.touch()
    config = load_config("quickstart", [f"tasks.0.path={large}", f"evaluation.tasks.0.path={small}"])
    assert large_files(config) == [f"reading {large} (3 MiB)"]
