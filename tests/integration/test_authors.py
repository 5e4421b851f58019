"""The way of docs/authors.md on made checkpoints and files of the authors' layouts, each command as a user types it."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import authors_files
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from latent_grpo.common.config import load_config
from latent_grpo.common.schema import decode
from latent_grpo.common.store import TrajectoryStore
from latent_grpo.deploy.cli.app import app
from latent_grpo.deploy.train import train

pytestmark = pytest.mark.integration
SMALL = ("rollout.workers=1", "rollout.resources.num_gpus=0", "rollout.resources.num_cpus=0.25")
LEARNER = (
    "learner.ranks=1", "learner.zero_stage=1", "learner.resources.num_gpus=0", "learner.resources.num_cpus=0.25",
)  # fmt: skip
LOW = "gsm8k-aug,gsm-hard,svamp,multiarith"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with `downloaded`, the authors' files, and the checkpoints `llama` and `qwen`."""
    folder = tmp_path_factory.mktemp("authors")
    for kind in ("llama", "qwen"):
        authors_files.checkpoint(folder / kind, kind)
    authors_files.data(folder / "downloaded", problems=2)
    return folder


@pytest.fixture(scope="module")
def command(place):
    """Runs a command of the program in `place`; returns what it printed.

    The tests' Ray was started in another folder, so models that actors load are named in full.
    """

    def run(*arguments: str, fails: bool = False) -> str:
        with contextlib.chdir(place):
            done = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "300", "HF_HUB_OFFLINE": "1"})
        assert (done.exit_code != 0) == fails, f"{' '.join(arguments)}:\n{done.output}\n{done.exception!r}"
        return done.output if not fails else str(done.exception)

    return run


@pytest.fixture(scope="module")
def data(place, command):
    """The fetched sets, below `place`."""
    command("data", "fetch", *LOW.split(","), "math500", "aime2024", "aime2025", "gpqa", "gsm8k-aug-oss-dup-all",
            "dapo-math-17k-en", "--from", "downloaded")  # fmt: skip
    return place / "data"


def evaluated(place, before) -> tuple[dict, list]:
    """The results and samples of the newest evaluation."""
    (run,) = set((place / "runs").glob("evaluate-*")) - before
    return json.loads((run / "evaluation.json").read_text()), decode(
        TrajectoryStore(run / "trajectories").read(0, "evaluation")
    )


def test_the_authors_files_become_the_product_s(data):
    assert {p.name for p in data.iterdir()} == {
        "GPQA-test.jsonl", "aime2024.parquet", "aime2025.parquet", "dapo_math_17k_en.parquet", "gsm8k_aug_test.parquet",
        "gsm8k_aug_oss_dup_all.parquet", "gsm_hard.parquet", "manifest.json", "math500.parquet", "multiarith.parquet",
        "svamp.parquet",
    }  # fmt: skip
    assert pq.read_table(data / "svamp.parquet").to_pylist() == [
        {"problem": f"What is {i} and {i}?", "answer": answer} for i, answer in enumerate("47")
    ]
    assert authors_files.INSTRUCTION not in str(pq.read_table(data / "dapo_math_17k_en.parquet").to_pylist())
    assert pq.read_table(data / "gsm8k_aug_oss_dup_all.parquet").column_names == [
        "problem",
        "answer",
        "cot",
        "solution",
    ]


@pytest.mark.parametrize(
    ("profile", "model", "left_out"), [("paper-low", "llama", True), ("paper-high", "qwen", False)]
)
def test_validate_shows_prompts_and_what_the_tokenizer_has_too_much(command, data, profile, model, left_out):
    said = command("validate", "--profile", profile, "--files", "--cpus", "64", "--gpus", "8", f"model.path={model}")
    assert ("<|compress_token|>" in said) == left_out
    text = " ".join(said.split())
    assert "<think>" in text
    assert text.count("put your final answer within \\boxed{}.") >= 2, "the settings, and the first prompts"
    assert "twice" not in text
    if profile == "paper-low":
        assert "Today Date: 26 Jul 2024" in text


def test_the_released_checkpoints_are_evaluated_in_both_protocols(ray_session, place, command, data):
    before = set((place / "runs").glob("evaluate-*"))
    said = command(
        "evaluate",
        "--model",
        str(place / "llama"),
        "--tasks",
        LOW,
        "evaluation.protocol=both",
        "model.dtype=bfloat16",
        *SMALL,
    )
    assert "protocol reference: temperature 0.6, top_p 0.95, no top_k; repetitions: gsm8k-aug 5, gsm-hard 5," in said
    content, samples = evaluated(place, before)
    assert [(t["task"], t["protocol"]) for t in content["tasks"]] == [
        (task, protocol) for task in LOW.split(",") for protocol in ("ours", "reference")
    ]
    assert [m["protocol"] for m in content["macro_averages"]] == ["ours", "reference"]
    for task in content["tasks"]:
        of_task = [s for s in samples if s.task == task["task"] and s.sampling.top_k == task["sampling"]["top_k"]]
        assert len(of_task) == task["samples"] == 10
        assert sum(s.reward for s in of_task) / 10 == pytest.approx(task["pass_at_1"]), "kept as they were graded"
    assert "reference, noise off" in said
    assert "published" not in said, "two problems are not the benchmark"


@pytest.mark.slow  # test_reference_protocol does the same without workers
def test_the_authors_folder_is_evaluated_as_it_lies_with_the_noise_off_and_on(ray_session, place, command):
    before = set((place / "runs").glob("evaluate-*"))
    said = command(
        "evaluate", "--model", str(place / "qwen"), "--tasks", "math500,gpqa", "--data", "downloaded",
        "evaluation.protocol=reference", "latent_exit=first", "model.max_positions=12000", *SMALL,
    )  # fmt: skip
    content, samples = evaluated(place, before)
    assert [(t["task"], t["noise"], t["samples"]) for t in content["tasks"]] == [
        ("math500", "off", 8), ("math500", "one_sided", 8), ("gpqa", "off", 16), ("gpqa", "one_sided", 16),
    ]  # fmt: skip
    assert {Path(t["path"]).name for t in content["tasks"]} == {"Math-500-test.parquet", "GPQA-test.jsonl"}
    assert {s.sampling.latent_exit for s in samples} == {"first"}
    assert "what has the noise on is sampled with noise.scale 1 (one_sided), the default" in said


def test_what_cannot_work_is_one_line_that_says_what_to_do(place, command):
    assert "--from qwen: svamp needs Svamp-test.parquet or Svamp-test.jsonl" in command(
        "data", "fetch", "svamp", "--from", "qwen", fails=True
    )
    assert command("evaluate", "--model", "llama", "--tasks", "svamp", "--data", "nowhere", fails=True).startswith(
        "latent-grpo data fetch svamp --to nowhere\n"
    )


@pytest.mark.slow  # test_sft, test_train and the tests above cover its parts
def test_latent_sft_training_and_report(ray_session, place, command, data):
    """Two steps of each, from the authors' training rows to a report."""
    common = ("evaluation.every=0", "evaluation.interim_problems=null", "evaluation.interim_runs=null",
              "model.dtype=float32", "rollout.engine=transformers", *SMALL, *LEARNER)  # fmt: skip
    command("sft", "--profile", "paper-low", *common, f"model.path={place / 'llama'}", "warm_start.max_steps=2",
            "warm_start.batch_size=4", "warm_start.evaluate_every=2", "warm_start.evaluation_problems=1",
            "warm_start.compression=1")  # fmt: skip
    (sft,) = (place / "runs").glob("paper-low-*")
    steps = ("steps=2", "prompts_per_step=2", "minibatch_prompts=2", "group_size=4", "self_test_groups=1")
    protocol = "evaluation.protocol=reference"
    with contextlib.chdir(place):  # the command would start it in a process of its own, with another Ray
        run = train(load_config("paper-low", [*common, f"model.path={sft / 'base'}", *steps, protocol]), "rl").path
    summary = json.loads((place / run / "summary.json").read_text())
    assert summary["evaluation_protocol"] == "reference"
    assert {name.split("/", 1)[1] for name in summary["after"] if name.endswith("pass_at_1")} == {"reference/pass_at_1"}
    command("report", str(run))
    assert "(protocol reference, noise off)" in command("inspect", str(run))
    before = set((place / "runs").glob("evaluate-*"))
    command("evaluate", "--model", str(place / run / "model"), "--profile", "paper-low", protocol,
            "model.dtype=float32", "rollout.engine=transformers", *SMALL)  # fmt: skip
    content, _ = evaluated(place, before)
    after = {task["task"]: task["pass_at_1"] for task in content["tasks"]}
    assert after == {
        name.split("/")[0]: value for name, value in summary["after"].items() if name.endswith("/pass_at_1")
    }
