"""Latent-SFT as a command, on real ranks: it stops and goes on bit for bit, at any ZeRO stage, latent and explicit."""

import contextlib
import io
import json
import signal

import numpy as np
import pytest
import torch
from rich.console import Console
from training import tiny

from latent_grpo.common.config import ConfigError
from latent_grpo.common.metrics import read_metrics
from latent_grpo.common.model_chain import read_chain
from latent_grpo.common.models import load_model
from latent_grpo.common.schema import decode
from latent_grpo.common.store import TrajectoryStore
from latent_grpo.deploy.reproduce.in_process import InProcessSFT, in_process_session
from latent_grpo.deploy.run.folder import ResumeError, create_run, write_identity
from latent_grpo.deploy.run.progress import Reporter
from latent_grpo.deploy.sft.loop import resume_sft, sft, warm_start
from latent_grpo.deploy.train import train

pytestmark = pytest.mark.integration
SFT = (
    "warm_start.compression=3",
    "warm_start.max_steps=6",
    "warm_start.batch_size=8",
    "warm_start.evaluate_every=4",
    "warm_start.evaluation_problems=8",
    "warm_start.optimizer.warmup_steps=2",
    "deterministic=true",
    "rollout.workers=1",
)


class InterruptedAt(Reporter):
    """Ctrl-C while the progress of a step is shown."""

    def __init__(self, step, name="Latent-SFT"):
        super().__init__()
        self.step, self.name = step, name

    @contextlib.contextmanager
    def phase(self, name, total, unit="steps"):
        def advance(completed, note=""):
            if name == self.name and completed == self.step:
                self.step = None  # once: the progress is shown again while the next step runs
                signal.raise_signal(signal.SIGINT)

        yield advance


def losses(folder):
    return [row["metrics"]["loss"] for row in read_metrics(folder.path, kind="sft")]


def weights(folder):
    return dict(load_model(folder.base_model).named_parameters())


def test_stopped_and_resumed_is_uninterrupted_bit_for_bit(ray_session, tmp_path):
    common = (f"runs_folder={tmp_path}", *SFT)
    whole = sft(tiny(*common), "whole")
    with pytest.raises(KeyboardInterrupt):
        sft(tiny(*common, "run_name=half"), "half", InterruptedAt(3))
    half = tmp_path / "half"
    assert not (half / "base").exists()
    again = tiny(*common, "run_name=half", "rollout.max_rows=64")  # by its name, as a cluster starts a job again
    resumed = sft(again, "half")

    expected, found = weights(whole), weights(resumed)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert losses(resumed) == losses(whole)
    rows = list(read_metrics(resumed.path, kind="sft"))
    assert [(row["step"], row["lineage"]) for row in rows] == [(s, int(s > 3)) for s in range(1, 7)]
    evaluated = [row["step"] for row in read_metrics(whole.path, kind="sft_evaluation")]
    assert evaluated == [4, 6]
    assert not resumed.sft.exists(), "a finished Latent-SFT keeps no states"
    for finished in (resume_sft(half, []), sft(again, "half")):  # nothing to do, and no second base
        assert finished.path == half
    with pytest.raises(ResumeError, match="group_size"):
        sft(tiny(*common, "run_name=half", "group_size=2"), "half")
    write_identity(resumed, again, 1, "train")
    with pytest.raises(ConfigError, match=r"run_name half: .* is a run of `train`; give another name"):
        sft(again, "half")

    chain = read_chain(whole.base_model)
    assert (chain.chain, chain.source, chain.k, chain.compression) == ("latent", "uniform", 3, 3)


def test_rows_that_latent_sft_does_not_use_are_a_warning_and_in_the_summary(tmp_path):
    rows = [{"problem": f"{i}+1?", "answer": "7", "cot": cot} for i, cot in enumerate(["", "3", *["1+2=3;"] * 8])]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    options = ("tasks.0.options={}", f"tasks.0.path={file}", "warm_start.max_steps=1", "warm_start.evaluate_every=1")
    config = tiny(*SFT, *options, f"runs_folder={tmp_path}")
    folder, console = create_run(config, "alone"), Console(width=400, record=True, file=io.StringIO(), highlight=False)
    with in_process_session(folder, config, Reporter(console)) as run:
        warm_start(run, InProcessSFT)
    lost = {"no chain of thought": 1, "chain of thought under warm_start.compression": 1}
    assert folder.read_json("summary.json")["sft"]["dropped"] == {"chains": lost}
    (line,) = [line for line in console.export_text().splitlines() if line.startswith("Latent-SFT on chains")]
    assert "1 no chain of thought (row 0); 1 chain of thought under warm_start.compression (row 1)" in line


@pytest.mark.slow
def test_zero_3_on_two_ranks_computes_what_zero_1_on_one_does(ray_session, tmp_path):
    """Unequal rows a rank, and an output layer that is called equally often on both."""
    common = (f"runs_folder={tmp_path}", *SFT)
    sharded = sft(
        tiny(*common, "learner.zero_stage=3", "learner.ranks=2", "learner.tokens_per_microbatch=96",
             "learner.logprob_chunk_tokens=8", "warm_start.batch_size=7", "warm_start.max_steps=3"), "sharded"
    )  # fmt: skip
    single = sft(tiny(*common, "learner.zero_stage=1", "warm_start.batch_size=7", "warm_start.max_steps=3"), "single")
    np.testing.assert_allclose(losses(sharded), losses(single), rtol=1e-4)
    expected, found = weights(single), weights(sharded)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=2e-4, rtol=1e-3)


def sft_in_process(config, name):
    folder = create_run(config, name)
    with in_process_session(folder, config, Reporter()) as run:
        warm_start(run, InProcessSFT)
    return folder


LORA = (*SFT, "warm_start.lora={rank: 4, alpha: 8.0}", "warm_start.optimizer.lr=0.01")


def test_lora_leaves_a_plain_model_whose_embeddings_are_the_initial_ones(tmp_path):
    folder = sft_in_process(tiny(f"runs_folder={tmp_path}", *LORA), "lora")
    initial = dict(load_model(folder.path / "initial").named_parameters())
    found = weights(folder)
    assert found.keys() == initial.keys()
    moved = {name for name in found if not torch.equal(found[name], initial[name])}
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in moved} == {
        f"{part}_proj" for part in ("q", "k", "v", "o", "gate", "up", "down")
    }
    assert losses(folder)[-1] < losses(folder)[0]
    assert not list(folder.base_model.glob("adapter*"))


@pytest.mark.slow
def test_lora_is_the_same_at_every_zero_stage_and_after_a_stop(ray_session, tmp_path):
    common = (f"runs_folder={tmp_path}", *LORA)
    single = sft(tiny(*common, "learner.zero_stage=1"), "single")
    sharded = ("learner.zero_stage=3", "learner.ranks=2", "learner.tokens_per_microbatch=96")
    with pytest.raises(KeyboardInterrupt):
        sft(tiny(*common, *sharded), "sharded", InterruptedAt(3))
    (half,) = tmp_path.glob("sharded-*")
    resumed = resume_sft(half, [])
    np.testing.assert_allclose(losses(resumed), losses(single), rtol=1e-4)
    expected, found = weights(single), weights(resumed)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=2e-4, rtol=1e-3)


@pytest.mark.slow
def test_the_settings_of_a_large_start_work_together(ray_session, tmp_path):
    """bfloat16, ZeRO, recomputed activations, small micro-batches and LoRA; the published weights are the model's."""
    large = ("model.dtype=bfloat16", "learner.gradient_checkpointing=true", "learner.tokens_per_microbatch=64")
    folder = sft(tiny(f"runs_folder={tmp_path}", *LORA, *large, "learner.zero_stage=3"), "large")
    assert json.loads((folder.base_model / "config.json").read_text())["dtype"] == "bfloat16"
    assert losses(folder)[-1] < losses(folder)[0]


# on ranks only in the slow case: in the test before the first, ranks stop and go on with latent chains
@pytest.mark.parametrize("run_sft", [sft_in_process, pytest.param(sft, marks=pytest.mark.slow)])
def test_explicit_sft_is_the_start_of_explicit_grpo_and_of_nothing_else(ray_session, tmp_path, run_sft):
    explicit = ("algorithm=grpo", f"runs_folder={tmp_path}", "tasks.0.max_response_tokens=22")
    config = tiny("warm_start.chain=explicit", *SFT, *explicit, "learner.zero_stage=0", "warm_start.max_steps=30")
    folder = run_sft(config, "explicit")
    assert read_chain(folder.base_model).chain == "explicit"
    assert np.mean(losses(folder)[-5:]) < 0.95 * losses(folder)[0]

    on_it = (f"model.path={folder.base_model}", "model.new=null", f"runs_folder={tmp_path}")
    trained = train(tiny(*on_it, "algorithm=grpo", "steps=1"), "grpo")
    assert all(len(t.latent_ids) == 0 for t in decode(TrajectoryStore(trained.trajectories).read(1)))
    assert read_chain(trained.model).chain == "explicit"
    with pytest.raises(ConfigError, match="has an explicit chain"):
        train(tiny(*on_it, "steps=1"), "latent")


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("zero", ["learner.zero_stage=2", "learner.zero_stage=3"])
def test_induced_labels_come_from_the_trained_encoder_and_a_stopped_stage_1_goes_on(ray_session, tmp_path, zero):
    steps = [f"warm_start.induction.{phase}_steps={n}" for phase, n in (("encoder", 4), ("decoder", 3), ("union", 3))]
    more = ("warm_start.source=induced", "warm_start.induction.batch_size=9", "learner.ranks=2", "checkpoint.every=2")
    small = ("learner.tokens_per_microbatch=128", "learner.logprob_chunk_tokens=8")
    common = (*SFT, *steps, *more, *small, zero)
    whole = sft(tiny(*common, f"runs_folder={tmp_path / 'whole'}"), "whole")
    with pytest.raises(KeyboardInterrupt):
        sft(tiny(*common, f"runs_folder={tmp_path / 'half'}"), "half", InterruptedAt(3, "stage 1, encoder"))
    (half,) = (tmp_path / "half").iterdir()
    resumed = resume_sft(half, [])

    chain = read_chain(whole.base_model)
    assert (chain.source, chain.compression) == ("induced", 3)
    encoders = [load_model(run.induction / "3-union" / "encoder") for run in (whole, resumed)]
    for (name, expected), (_, found) in zip(*(e.named_parameters() for e in encoders), strict=True):
        assert torch.equal(expected, found), name
    assert all(torch.equal(a, b) for a, b in zip(weights(whole).values(), weights(resumed).values(), strict=True))

    # only the encoder learned in the first step, and labels stay mixtures of the initial embeddings
    initial, first = dict(load_model(whole.path / "initial").named_parameters()), whole.induction / "1-encoder"
    decoder, encoder = (dict(load_model(first / side).named_parameters()) for side in ("decoder", "encoder"))
    assert all(torch.equal(initial[name], decoder[name]) for name in initial)
    assert any(not torch.equal(initial[name], encoder[name]) for name in initial)
    last = dict(load_model(whole.induction / "3-union" / "decoder").named_parameters())
    assert torch.equal(last["model.embed_tokens.weight"], initial["model.embed_tokens.weight"])
    kinds = [row["metrics"] for row in read_metrics(whole.path, kind="induction_union_held_out")]
    assert kinds[0].keys() == {"answer_loss", "shuffled"}
