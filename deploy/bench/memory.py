"""The benchmark `latent-grpo bench memory`: a learner rank's memory beside what `validate` and `plan` predict.

Each case is one rank or two, in processes of their own, that load a random model of 135 M parameters, of SmolLM2's
shape, and make two steps on random trajectories, through DeepSpeed. The measured figure is the largest private memory
of a rank less what the process has once torch, transformers and DeepSpeed are loaded, plus the frozen weights that it
reads from the mapped file. The C library returns what is freed (`RETURNING`), so that tensors are measured and not what
its heap keeps, which is as much again with its defaults (docs/measured.md).
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Table

from latent_grpo.common.terminal_text import TextConsole
from latent_grpo.deploy.bench.own_process import PrivatePeak, alone, side_by_side

if TYPE_CHECKING:
    import pyarrow as pa

    from latent_grpo.common.config import RunConfig

SHAPE = {
    "vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 1024, "tie_word_embeddings": True,
}  # fmt: skip
TWO = ["learner.ranks=2"]
CASES: dict[str, list[str]] = {
    "float32": [],
    "float32, all weights": ["freeze_embeddings=false"],
    "KL term": ["kl_coefficient=0.01"],
    "checkpointing": ["learner.gradient_checkpointing=true"],
    "checkpointing, 15 of 30 layers": ["learner.gradient_checkpointing=15"],
    "top 8 layers": ["model.train_layers=8"],
    "LoRA of rank 16": ["lora.rank=16"],
    "bfloat16": ["model.dtype=bfloat16"],
    "two ranks, ZeRO-2": TWO,
    "two ranks, ZeRO-3": [*TWO, "learner.zero_stage=3"],
    "two ranks, ZeRO-3, KL term": [*TWO, "learner.zero_stage=3", "kl_coefficient=0.01"],
    "two ranks, ZeRO-3, bfloat16": [*TWO, "learner.zero_stage=3", "model.dtype=bfloat16"],
}
RETURNING = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # glibc: larger blocks are mapped one by one, and so returned
PROMPTS, SAMPLES, PROMPT, RESPONSE, K = 2, 4, 96, 160, 10
TOKENS = 1024  # of a micro-batch


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    name: str
    predicted_mib: float
    measured_mib: float

    @property
    def ratio(self) -> float:
        """Predicted to measured."""
        return self.predicted_mib / self.measured_mib


def measure(names: Sequence[str] = tuple(CASES), shape: dict[str, Any] | None = None) -> list[Case]:
    """Measures the named cases of :data:`CASES` one by one. It sets `RETURNING` in this process's environment."""
    os.environ.update(RETURNING)
    with tempfile.TemporaryDirectory(prefix="lg-bench-") as scratch:
        folder = str(Path(scratch, "model"))
        alone(_make_model, folder, SHAPE | (shape or {}))
        return [Case(name=name, **_ranks(folder, CASES[name])) for name in names]


def _ranks(folder: str, keys: list[str]) -> dict[str, float]:
    """Runs the ranks of a case side by side and returns what the largest of them had."""
    ranks, address = settings(folder, keys).learner.ranks, _address()
    found = side_by_side(_rank, [(index, address, folder, keys) for index in range(ranks)])
    return max(found, key=lambda one: one["measured_mib"])


def _make_model(folder: str, shape: dict[str, Any]) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(folder)


def settings(folder: str, keys: Sequence[str]) -> RunConfig:
    from latent_grpo.common.config import load_config

    budget = {"max_prompt_tokens": PROMPT, "max_response_tokens": RESPONSE}
    data = {
        "k": K, "group_size": SAMPLES, "prompts_per_step": PROMPTS, "minibatch_prompts": PROMPTS, "masking": "off",
        "model": {"path": folder}, "tasks": [{"name": "bench", "path": "builtin:arithmetic", **budget}],
        "learner": {"tokens_per_microbatch": TOKENS, "share_prompts": False},
    }  # fmt: skip
    return load_config(data, keys)


def _rank(index: int, address: tuple[str, int], folder: str, keys: list[str]) -> dict[str, float]:
    """Predicted and measured MiB of one rank with these settings."""
    import deepspeed.ops.adam  # noqa: F401  # what it loads is none of the rank's own
    import torch

    from latent_grpo.learner.rank import LearnerRank

    config, rank = settings(folder, keys), LearnerRank()
    predicted, vocabulary = _predicted(config, folder)
    batch = _batch(vocabulary)
    torch.ones(64, 64, requires_grad=True).mm(torch.ones(64, 64)).sum().backward()  # its threads and libraries
    peak = PrivatePeak()
    rank.setup(index, config.learner.ranks, *address, config.model_dump_json(), folder)
    mapped = sum(
        p.nbytes
        for module in (rank.module, rank.reference)
        if isinstance(module, torch.nn.Module)
        for p in module.parameters()
        if not p.requires_grad and p.dtype == torch.float32  # as the file has them: no copies
    )
    for step in range(2):  # AdamW's moments exist from the end of the first on
        rank.train_step(batch, step)
    return {"predicted_mib": predicted / 2**20, "measured_mib": peak.added + mapped / 2**20}


def _predicted(config: RunConfig, folder: str) -> tuple[int, int]:
    """Returns the predicted bytes of a rank that writes no checkpoint meanwhile, and the rows of the vocabulary."""
    from latent_grpo.common.model_check import empty_model, read_settings
    from latent_grpo.deploy.checks.memory import ModelShape, rank_memory

    shape, longest = ModelShape.of_model(empty_model(read_settings(folder), folder)), PROMPT + RESPONSE
    predicted = rank_memory(
        config,
        shape,
        longest * PROMPTS * SAMPLES // config.learner.ranks,
        frozen_embeddings=config.freeze_embeddings,
        longest=longest,
        lora=config.lora,
        reference=config.kl_coefficient > 0 and config.lora is None,
    )
    return predicted.total - predicted.checkpoint, shape.rows


def _address() -> tuple[str, int]:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return "127.0.0.1", probe.getsockname()[1]


def _batch(vocabulary: int) -> pa.RecordBatch:
    """Groups of random samples, half of whose steps are latent."""
    from dataclasses import replace

    from latent_grpo.common.schema import encode
    from latent_grpo.deploy.bench.workload import random_trajectory

    draw, rows = np.random.default_rng(0), []
    half = {"latents": RESPONSE // 2, "hard": RESPONSE - RESPONSE // 2}
    for group in range(PROMPTS):
        prompt = draw.integers(0, vocabulary, PROMPT)
        for sample in range(SAMPLES):
            row = random_trajectory(draw, prompt, **half, k=K, vocabulary=vocabulary, group=group, sample=sample)
            rows.append(replace(row, reward=float(sample % 2)))
    return encode(rows, K)


def show(found: Sequence[Case], console: Console | None = None) -> None:
    title = f"a learner rank of 135 M parameters, micro-batches of {TOKENS:,} tokens"
    table = Table("", "predicted MiB", "measured MiB", "predicted / measured", title=title)
    for case in found:
        table.add_row(case.name, f"{case.predicted_mib:,.0f}", f"{case.measured_mib:,.0f}", f"{case.ratio:.2f}")
    (console or TextConsole()).print(table)
