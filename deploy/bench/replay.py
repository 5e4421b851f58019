"""The benchmark `latent-grpo bench replay`: the learner's forward and backward pass with prompts shared and not.

The samples of a group may lie behind one prompt (`learner.share_prompts`). Both ways compute the same log-probs and
gradients; the table says how long they take on one thread, for a small Llama and several lengths.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from latent_grpo.common.schema import TrajectoryBatch, encode
from latent_grpo.common.terminal_text import TextConsole
from latent_grpo.deploy.bench.timing import interleaved
from latent_grpo.deploy.bench.workload import bench_model, random_trajectory
from latent_grpo.learner.batching import ReplayInputs, Sharing, collate, group_indices, plan
from latent_grpo.learner.policy import PolicyModule

LENGTHS = ((160, 24), (160, 64), (160, 128), (100, 300))
"""Tokens of a prompt and steps of a response; 160 and 24 are those of GSM8K with the paper's low settings."""
GROUPS, SAMPLES, K = 2, 8, 3
TOKENS = 4096  # of a micro-batch


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """What was found for one pair of lengths."""

    prompt: int
    response: int
    samples_a_sequence: float
    positions: float  # computed without sharing, relative to those with it
    ratio: float  # of the times, likewise


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayBench:
    """A table of `bench replay`."""

    model: str
    rows: list[Lengths]


def measure(*, hidden: int, layers: int, repeats: int, lengths: Sequence[tuple[int, int]] = LENGTHS) -> ReplayBench:
    """Measures forward and backward pass for each (prompt, response) of `lengths`, CPU seconds of one thread."""
    torch.set_num_threads(1)
    model = bench_model(2048, hidden, layers)
    module, rows = PolicyModule(model), []
    for prompt, response in lengths:
        view = _batch(prompt, response, model.config.vocab_size)
        ways: dict[str, Callable[[], float]] = {}
        inputs = {}
        for name, sharing in (("alone", None), ("shared", Sharing(token_in_pairs=6 * hidden))):
            inputs[name] = _inputs(view, sharing)
            ways[name] = partial(_step, module, inputs[name])
        found = interleaved(ways, repeats)
        alone, shared = (sum(micro.ids.numel() for micro in inputs[name]) for name in ("alone", "shared"))
        rows.append(
            Lengths(
                prompt=prompt,
                response=response,
                samples_a_sequence=GROUPS * SAMPLES / sum(len(micro.ids) for micro in inputs["shared"]),
                positions=alone / shared,
                ratio=found["shared"].ratio_to(found["alone"]),
            )
        )
    return ReplayBench(model=f"Llama, V = 2,048, D = {hidden}, {layers} layers, float32, one thread", rows=rows)


def _step(module: PolicyModule, inputs: list[ReplayInputs]) -> float:
    for micro in inputs:
        module.zero_grad(set_to_none=True)
        module(micro).sum().backward()
    return 1.0


def _inputs(view: TrajectoryBatch, sharing: Sharing | None) -> list[ReplayInputs]:
    (mini,) = plan(
        view.prompt_ids.lengths,
        view.num_steps,
        group_indices(view.strings("group_uid")),
        minibatch_prompts=GROUPS,
        ranks=1,
        tokens_per_microbatch=TOKENS,
        chunk_tokens=TOKENS,
        sharing=sharing,
    )
    return [collate(view, micro.sequences, micro.chunks) for micro in mini.ranks[0]]


def _batch(prompt: int, response: int, vocabulary: int) -> TrajectoryBatch:
    """Makes groups of random samples, half of whose steps are latent."""
    draw, rows = np.random.default_rng(0), []
    latents = response // 2
    for group in range(GROUPS):
        prompt_ids = draw.integers(0, vocabulary, prompt)
        for sample in range(SAMPLES):
            rows.append(
                random_trajectory(
                    draw,
                    prompt_ids,
                    latents=latents,
                    hard=response - latents,
                    k=K,
                    vocabulary=vocabulary,
                    group=group,
                    sample=sample,
                )
            )
    return TrajectoryBatch(encode(rows, K))


def show(found: ReplayBench, console: Console | None = None) -> None:
    columns = ("prompt", "response", "samples a sequence", "positions", "times faster")
    table = Table(*columns, title=f"bench replay, prompts shared: {found.model}")
    for row in found.rows:
        figures = (f"{row.samples_a_sequence:.1f}", f"1/{row.positions:.2f}", f"{row.ratio:.2f}")
        table.add_row(str(row.prompt), str(row.response), *figures)
    (console or TextConsole()).print(table)
