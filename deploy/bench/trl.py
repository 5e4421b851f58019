"""The benchmark `latent-grpo bench trl`: a step of TRL's GRPOTrainer beside one of ours, on the same model and prompts.

Each way runs in a process of its own with one thread, in turns, and reports CPU seconds a step and its peak memory. All
sample with the same settings, grade with the same rule, and train all weights with the same learning rate:

* ours, explicit: algorithm `grpo`, the rollout's log-probs the old ones, as TRL has them where one update follows;
* ours, explicit, recomputed: with a pass of the learner for them, our default;
* ours, latent: `latent_grpo` with centered scores, for which TRL has no counterpart.

:func:`agreement` compares loss and gradient on the same rollouts. TRL is an extra: `pip install 'latent-grpo[trl]'`.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from latent_grpo.common.errors import ConfigError
from latent_grpo.common.terminal_text import TextConsole
from latent_grpo.deploy.bench.own_process import alone, peak_mib
from latent_grpo.reward.verifier import Grade

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from latent_grpo.common.config import RunConfig

VOCABULARY, HIDDEN, LAYERS = 512, 128, 4
PROMPTS, SAMPLES, PROMPT, RESPONSE = 2, 8, 32, 64
SAMPLING: dict[str, Any] = {"temperature": 0.6, "top_p": 0.95, "top_k": 30}
LR = 1e-5
WARM_UP = 2
OURS: dict[str, list[str]] = {
    "ours, explicit": ["algorithm=grpo", "old_log_probs=behaviour"],
    "ours, explicit, recomputed": ["algorithm=grpo"],
    "ours, latent": ["algorithm=latent_grpo", "k=3", "centering_draws=8", "component_weighting=uniform"],
}
TRL = "TRL"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Of one way: medians over the turns."""

    cpu_s: float  # of a step
    peak_mib: float  # of its process


@dataclass(frozen=True, slots=True, kw_only=True)
class TrlBench:
    """A table of `bench trl`."""

    trl: str  # version
    steps: int  # counted in a turn
    costs: dict[str, Cost]
    loss_gap: float  # relative, on the same rollouts
    gradient_gap: float  # relative L2


class Scattered:
    """A verifier whose verdict is a function of the text alone, so that a group's rewards differ whatever the model."""

    def grade(self, response_text: str, gold: str) -> Grade:
        """The verdict on a text: its length's parity."""
        right = len(response_text) % 2 == 1
        return Grade(float(right), "correct" if right else "wrong")


def trl_missing() -> str | None:
    """Returns why TRL's rows cannot be measured, or None."""
    return None if find_spec("trl") else "TRL is not installed: pip install 'latent-grpo[trl]'"


def measure(steps: int, turns: int) -> TrlBench:
    """Measures `steps` steps of each way, `turns` times in turn. Raises ConfigError without TRL."""
    if missing := trl_missing():
        raise ConfigError(f"bench trl: {missing}")
    from trl import __version__ as version

    found: dict[str, list[tuple[float, float]]] = {TRL: [], **{name: [] for name in OURS}}
    with tempfile.TemporaryDirectory(prefix="lg-bench-") as scratch:
        model = make_model(Path(scratch) / "model")
        for _ in range(turns):
            for name, costs in found.items():
                run = _trl_steps if name == TRL else _our_steps
                costs.append(alone(run, str(model), name, steps, scratch))
        loss, gradient = alone(agreement, str(model))
    costs_of = {
        name: Cost(cpu_s=statistics.median(c for c, _ in of), peak_mib=statistics.median(m for _, m in of))
        for name, of in found.items()
    }
    return TrlBench(trl=version, steps=steps, costs=costs_of, loss_gap=loss, gradient_gap=gradient)


# --- the model and the prompts, for both -------------------------------------------------------------------------


def make_model(folder: Path) -> Path:
    """Writes a Llama with random weights and a tokenizer of one token a word; returns the folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = _tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=3 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        max_position_embeddings=256,
        initializer_range=0.08,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", "<think>", "</think>"]
    words += [f"w{i}" for i in range(VOCABULARY - len(words))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", padding_side="left",
        additional_special_tokens=["<think>", "</think>"],
    )  # fmt: skip


def prompts() -> list[str]:
    """The problems: words, of which one token of thinking is appended by both."""
    return [" ".join(f"w{(31 * i + 7 * j) % 500}" for j in range(PROMPT - 1)) for i in range(64)]


# --- one way, in a process of its own ----------------------------------------------------------------------------


def _trl_steps(model: str, name: str, steps: int, scratch: str) -> tuple[float, float]:
    """CPU seconds of a step of TRL, and the peak memory of this process in MiB."""
    import torch
    from transformers import TrainerCallback

    torch.set_num_threads(1)
    marks: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            marks.append(time.process_time())

    trainer = _trainer(model, WARM_UP + steps, scratch, [Clock()])
    trainer.train()
    return (marks[-1] - marks[WARM_UP - 1]) / steps, peak_mib()


def _trainer(model: str, steps: int, scratch: str, callbacks: list[Any]) -> Any:
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    def rewards(completions: list[str], **columns: object) -> list[float]:
        grader = Scattered()
        return [float(grader.grade(text, "").reward or 0.0) for text in completions]

    config = GRPOConfig(
        output_dir=f"{scratch}/trl",
        per_device_train_batch_size=PROMPTS * SAMPLES,
        num_generations=SAMPLES,
        max_completion_length=RESPONSE,
        max_steps=steps,
        learning_rate=LR,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        loss_type="dapo",
        beta=0.0,
        use_cpu=True,
        bf16=False,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        **SAMPLING,
    )
    return GRPOTrainer(
        model=model,
        reward_funcs=rewards,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": [f"{text} <think>" for text in prompts()]}),
        processing_class=AutoTokenizer.from_pretrained(model, padding_side="left", trust_remote_code=False),
        callbacks=callbacks,
    )


def our_config(model: str, name: str, steps: int, scratch: str) -> RunConfig:
    """Our settings of a way (`OURS`), which say the same as TRL's."""
    from latent_grpo.common.config import load_config

    rows = Path(scratch) / "prompts.jsonl"
    rows.write_text("".join(json.dumps({"problem": text, "answer": "w1"}) + "\n" for text in prompts()), "utf-8")
    settings: dict[str, Any] = {
        "model": {"path": model},
        "tasks": [
            {
                "name": "words",
                "path": str(rows),
                "verifier": f"{__name__}:{Scattered.__name__}",
                "prompt": {"format": "{problem} "},
                "max_prompt_tokens": 2 * PROMPT,
                "max_response_tokens": RESPONSE,
            }
        ],
        "steps": steps,
        "group_size": SAMPLES,
        "prompts_per_step": PROMPTS,
        "minibatch_prompts": PROMPTS,
        "dynamic_sampling": "drop",
        "masking": "off",  # most samples are cut off by the budget, and TRL learns from them
        "freeze_embeddings": False,
        "optimizer": {"lr": LR, "weight_decay": 0.0},
        "evaluation": {"at_start": False, "at_end": False},
        "dump": {"every": 0},
        "metrics": {"sinks": []},
        "runs_folder": f"{scratch}/runs",
        "self_test_groups": 0,
        **SAMPLING,
    }
    return load_config(settings, OURS[name])


def _our_steps(model: str, name: str, steps: int, scratch: str) -> tuple[float, float]:
    """CPU seconds of a step of ours in one process, and the peak memory of this process in MiB."""
    from latent_grpo.deploy.controller import Controller
    from latent_grpo.deploy.reproduce.in_process import InProcessLearner, in_process_session
    from latent_grpo.deploy.run.folder import create_run
    from latent_grpo.deploy.run.progress import Reporter

    config, reporter = our_config(model, name, WARM_UP + steps, scratch), Reporter(TextConsole(quiet=True))
    with in_process_session(create_run(config, "bench"), config, reporter) as run:
        controller = Controller(config, run.pool, InProcessLearner(config, run.initial), run.problems.requests)
        controller.begin()
        for _ in range(WARM_UP):
            controller.run_step()
        began = time.process_time()
        for _ in range(steps):
            controller.run_step()
        return (time.process_time() - began) / steps, peak_mib()


# --- the same numbers --------------------------------------------------------------------------------------------


def agreement(model: str) -> tuple[float, float]:
    """Relative difference of the loss, and relative L2 difference of the gradient, on the same rollouts.

    TRL's `dapo` loss and ours (METHOD §5) agree where the ratio is 1: token mean over the batch, advantages per group.
    """
    import torch

    torch.set_num_threads(1)
    ours, theirs = _our_gradient(model), _trl_gradient(model)
    loss = abs(ours[0] - theirs[0]) / abs(theirs[0])
    return loss, float((ours[1] - theirs[1]).norm() / theirs[1].norm())


def _rollouts() -> tuple[Any, Any, Any, Any]:
    """Prompts [B, P], completions [B, T] with their lengths [B], and advantages [B] of random rewards."""
    import numpy as np
    import torch

    from latent_grpo.learner.advantages import group_advantages

    draw, rows = np.random.default_rng(0), PROMPTS * SAMPLES
    prompt = np.repeat(draw.integers(4, VOCABULARY, (PROMPTS, PROMPT)), SAMPLES, axis=0)
    completion = draw.integers(4, VOCABULARY, (rows, RESPONSE))
    rewards = torch.from_numpy((draw.random(rows) < 0.4).astype(np.float32))
    advantages = group_advantages(rewards, np.arange(rows) // SAMPLES, np.ones(rows, dtype=bool))
    lengths = torch.from_numpy(draw.integers(RESPONSE // 4, RESPONSE + 1, rows))
    return torch.from_numpy(prompt), torch.from_numpy(completion), lengths, advantages


def _trl_gradient(model: str) -> tuple[float, Any]:
    import torch

    prompt, completion, lengths, advantages = _rollouts()
    mask = (torch.arange(RESPONSE) < lengths.unsqueeze(1)).long()
    with tempfile.TemporaryDirectory() as scratch:
        trainer = _trainer(model, 1, scratch, [])
        trainer.current_gradient_accumulation_steps = 1
        inputs = {
            "prompt_ids": prompt,
            "prompt_mask": torch.ones_like(prompt),
            "completion_ids": completion,
            "completion_mask": mask,
            "advantages": advantages,
            "num_items_in_batch": mask.sum(),
        }
        trainer.model.train()
        loss = trainer._compute_loss(trainer.model, inputs)
        loss.backward()
        return float(loss.detach()), torch.cat([p.grad.reshape(-1) for p in trainer.model.parameters()])


def _our_gradient(model: str) -> tuple[float, Any]:
    import numpy as np
    import torch

    from latent_grpo.common.schema import TrajectoryBatch, encode
    from latent_grpo.common.types import SamplingSettings, Trajectory
    from latent_grpo.learner.batching import collate
    from latent_grpo.learner.logprobs import step_log_probs
    from latent_grpo.learner.objective import policy_loss
    from latent_grpo.learner.policy import PolicyModule, load_policy_model

    prompt, completion, lengths, advantages = _rollouts()
    sampling = SamplingSettings(mode="visible", max_tokens=RESPONSE, k=0, noise_mode="off", **SAMPLING)
    rows = [
        Trajectory(
            purpose="training", task="bench", problem_uid=f"bench/{i // SAMPLES}", group_uid=str(i // SAMPLES),
            sample_index=i % SAMPLES, epoch=0, run_seed=0, policy_version_min=0, policy_version_max=0, engine="bench",
            sampling=sampling, prompt_ids=prompt[i].numpy().astype(np.int32),
            latent_ids=np.zeros((0, 0), np.int32), latent_scores=np.zeros((0, 0), np.float32),
            latent_log_probs=np.zeros((0, 0), np.float32),
            hard_ids=completion[i, : lengths[i]].numpy().astype(np.int32),
            hard_log_probs=np.zeros(int(lengths[i]), np.float32), finish_reason="stop",
        )
        for i in range(len(prompt))
    ]  # fmt: skip
    module = PolicyModule(load_policy_model(model), freeze_embeddings=False)
    groups = [tuple(range(g * SAMPLES, (g + 1) * SAMPLES)) for g in range(PROMPTS)]
    inputs = collate(TrajectoryBatch(encode(rows, 0)), groups)
    log_probs = step_log_probs(module(inputs), inputs, weighting="uniform")
    of_steps = advantages[inputs.batch_rows]
    loss, _ = policy_loss(log_probs, log_probs.detach(), of_steps, torch.ones_like(of_steps, dtype=torch.bool))
    loss.backward()
    return float(loss.detach()), torch.cat([p.grad.reshape(-1) for p in module.parameters() if p.grad is not None])


def show(found: TrlBench, console: Console | None = None) -> None:
    title = (
        f"a step of {PROMPTS * SAMPLES} rows of {RESPONSE} tokens, V = {VOCABULARY}, D = {HIDDEN}, {LAYERS} layers, "
        f"one thread; TRL {found.trl}"
    )
    table = Table("", "CPU s a step", "of TRL's speed", "peak MiB", "of TRL's", title=title)
    theirs = found.costs[TRL]
    for name, cost in found.costs.items():
        ratios = (f"{theirs.cpu_s / cost.cpu_s:.2f}", f"{cost.peak_mib:,.0f}", f"{cost.peak_mib / theirs.peak_mib:.2f}")
        table.add_row(name, f"{cost.cpu_s:.3f}", *ratios)
    console = console or TextConsole()
    console.print(table)
    console.print(
        f"on the same rollouts: loss within {found.loss_gap:.1e}, gradient within {found.gradient_gap:.1e} (L2)"
    )
