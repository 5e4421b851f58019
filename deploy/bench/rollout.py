"""The benchmark `latent-grpo bench rollout`: the engine's decode loop, `model.generate`, and the cost of a latent step.

It uses one tiny model, one process and one thread. The end of text is switched off on both sides, so that lengths are
those of the case; every row stops at its own length. Only requested tokens count, not those that `generate` computes
for rows that are already done.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel, StoppingCriteria

from latent_grpo.common.terminal_text import TextConsole
from latent_grpo.deploy.bench.rollout_vllm import measure_vllm, vllm_missing
from latent_grpo.deploy.bench.timing import interleaved
from latent_grpo.deploy.bench.workload import (
    RESPONSE,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    Row,
    Workload,
    bench_model,
    compared,
    facts_of,
    load_own_weights,
    requests_of,
    run_engine,
)
from latent_grpo.rollout_workers.lean_forward import LeanForward
from latent_grpo.rollout_workers.transformers_engine import TransformersEngine


class _OwnLength(StoppingCriteria):
    """Stops each row of `generate` at its own length."""

    def __init__(self, prompt: int, lengths: np.ndarray, device: torch.device) -> None:
        self._until = torch.from_numpy(prompt + lengths).to(device)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: object) -> torch.Tensor:
        return input_ids.shape[1] >= self._until


def run_generate(model: PreTrainedModel, work: Workload, cache: str | None = None) -> float:
    """Samples with `generate`, by a kind of cache (None: Transformers' default); returns the tokens asked for."""
    prompt_ids = torch.from_numpy(work.prompts).long().to(model.device)
    lengths = np.repeat(work.lengths, work.samples)
    generate: Any = model.generate  # a mixin's, which PreTrainedModel does not name
    generate(
        prompt_ids,
        attention_mask=torch.ones_like(prompt_ids),
        do_sample=True,
        temperature=TEMPERATURE,
        top_p=TOP_P,
        top_k=TOP_K,
        num_return_sequences=work.samples,
        max_new_tokens=int(work.lengths.max()),
        stopping_criteria=[_OwnLength(prompt_ids.shape[1], lengths, model.device)],
        cache_implementation=cache,
        disable_compile=True,
    )
    return work.tokens


@contextmanager
def forward_share(model: PreTrainedModel) -> Iterator[Callable[[], float]]:
    """Measures the seconds that the model itself (body and head, by either pass) takes inside the block."""
    spent = [0.0]

    def timing(forward: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*arguments: Any, **options: Any) -> Any:
            began = time.process_time()
            try:
                return forward(*arguments, **options)
            finally:
                spent[0] += time.process_time() - began

        return wrapper

    modules, lean = (model.base_model, model.get_output_embeddings()), LeanForward.__call__
    for module in modules:
        module.forward = timing(module.forward)
    LeanForward.__call__ = timing(lean)  # type: ignore[method-assign]
    try:
        yield lambda: spent[0]
    finally:
        for module in modules:
            del module.forward
        LeanForward.__call__ = lean  # type: ignore[method-assign]


def workloads(vocabulary: int, rows: int, rng: np.random.Generator) -> list[Workload]:
    """Returns the cases of the comparison with `generate`: `rows` of equal and of ragged lengths, and long prompts."""

    def prompts(count: int, length: int) -> np.ndarray:
        return rng.integers(2, vocabulary, (count, length)).astype(np.int32)

    full = np.full(rows, RESPONSE)
    ragged = rng.permutation(np.linspace(RESPONSE // 8, RESPONSE, rows).round().astype(int))
    return [
        Workload(name=f"{rows} rows, equal lengths", prompts=prompts(rows, 32), samples=1, lengths=full),
        Workload(name=f"{rows} rows, 8 to 64 steps", prompts=prompts(rows, 32), samples=1, lengths=ragged),
        Workload(name="8 prompts of 200, G = 8", prompts=prompts(8, 200), samples=8, lengths=np.full(8, RESPONSE)),
    ]


GOAL = ">= 2"


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutBench:
    """A table of `bench rollout`."""

    model: str
    rows: list[Row]
    forward_shares: dict[str, float]  # kind of step -> share of the model's own forward passes in the whole
    note: str = ""  # why rows are missing


def measure(*, vocabulary: int, hidden: int, layers: int, k: int, repeats: int, batch: int = 64) -> RolloutBench:
    """Measures the engine and `generate`, latent and hard steps, the model's own share, and the same in vLLM."""
    torch.set_num_threads(1)
    model = bench_model(vocabulary, hidden, layers)
    engine = TransformersEngine(model, facts_of(model), max_rows=max(batch, 64))
    load_own_weights(engine, model)
    rows = []
    cases = workloads(vocabulary, batch, np.random.default_rng(0))
    for work in cases:
        visible = requests_of(work, "visible", k)
        found = interleaved(
            {
                "ours": partial(run_engine, engine, visible),
                "generate": partial(run_generate, model, work),
            },
            repeats,
        )
        rows.append(compared(f"hard steps, {work.name}: ours to generate", found["ours"], found["generate"], GOAL))
    equal = cases[0]
    kinds = {
        "hard": requests_of(equal, "visible", k),
        "latent": requests_of(equal, "latent", k),
        "latent, noise off": requests_of(equal, "latent", k, "off"),
    }
    ways = {name: partial(run_engine, engine, requests) for name, requests in kinds.items()}
    found = interleaved({**ways, "generate": partial(run_generate, model, equal)}, repeats)
    title = f"latent steps, {equal.name}, K = {k}: ours to generate's hard ones"
    rows.append(compared(title, found["latent"], found["generate"], GOAL))
    for name in ("latent", "latent, noise off"):
        title = f"{equal.name}, K = {k}: hard to {name} steps"
        rows.append(compared(title, found["hard"], found[name], "<= 1.3"))
    shares = {}
    for name, requests in kinds.items():
        with forward_share(model) as seconds:
            began = time.process_time()
            run_engine(engine, requests)
            shares[name] = seconds() / (time.process_time() - began)
    note = vllm_missing()
    if note is None:
        rows += measure_vllm(model, k, repeats)
    description = f"Llama, V = {vocabulary:,}, D = {hidden}, {layers} layers, float32, one thread"
    return RolloutBench(
        model=description, rows=rows, forward_shares=shares, note=f"no vLLM rows: {note}" if note else ""
    )


def show(found: RolloutBench, console: Console | None = None) -> None:
    table = Table("tokens per CPU second", "first", "second", "ratio", "goal", title=f"bench rollout: {found.model}")
    for row in found.rows:
        table.add_row(row.what, *(f"{rate:,.0f}" for rate in row.rates), f"{row.ratio:.2f}", row.goal)
    console = console or TextConsole()
    console.print(table)
    shares = ", ".join(f"{name} {share:.0%}" for name, share in found.forward_shares.items())
    console.print(f"share of the model's own forward passes: {shares}")
    if found.note:
        console.print(found.note, soft_wrap=True)
