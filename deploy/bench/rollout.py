"""`latent-grpo bench rollout`: our decode loop beside `model.generate`, and what a latent step costs.

One tiny model, one process, one thread. Ends of text are switched off on both sides, so that lengths are what the
case says; every row stops at its own length. Tokens are the ones asked for: what `generate` computes for rows that
are done already is not counted.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, StoppingCriteria

from common.types import GroupRequest, PolicyVersion, SamplingSettings, TokenFacts
from common.weights import checksum
from deploy.bench.timing import Timing, interleaved
from rollout_workers.engine import LatentEngine, generate
from rollout_workers.transformers_engine import TransformersEngine

END_ID, PAD_ID = 1, 0
TEMPERATURE, TOP_P, TOP_K = 0.6, 0.95, 30
RESPONSE = 64
LOGIT_SPREAD = 3.6


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Prompts [n, P] of one length, `samples` of each, and how long each sample gets."""

    name: str
    prompts: np.ndarray
    samples: int
    lengths: np.ndarray  # [n] response steps, the same for a prompt's samples

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum()) * self.samples

    @property
    def rows(self) -> int:
        return len(self.prompts) * self.samples


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the result."""

    what: str
    rates: tuple[float, float]  # tokens a CPU second: the first named, the second named
    ratio: float  # of the first to the second, neighbouring repeats compared
    goal: str


def bench_model(vocabulary: int, hidden: int, layers: int) -> PreTrainedModel:
    """A random Llama whose head is scaled so that its logits spread as a trained model's do.

    Nearly flat ones, as a plain random model has them, are the sampler's worst case and no model's usual one.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=max(hidden // 32, 1),
        head_dim=32,
        max_position_embeddings=1024,
        initializer_range=0.08,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=PAD_ID,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(LOGIT_SPREAD / (config.initializer_range * hidden**0.5))
    return model


def facts_of(model: PreTrainedModel) -> TokenFacts:
    """No end of text; the latent-end token is not allowed, so latent rows stay latent until their budget ends."""
    allowed = np.ones(model.config.vocab_size, dtype=bool)
    allowed[[PAD_ID, END_ID]] = False
    return TokenFacts(vocab_size=len(allowed), allowed=allowed, latent_end_id=END_ID, eos_ids=(), pad_id=PAD_ID)


def load_own_weights(engine: LatentEngine, model: PreTrainedModel) -> None:
    tensors = [(name, p.detach().clone()) for name, p in model.named_parameters()]
    engine.load_weights(PolicyVersion(version=0, checksum=checksum(tensors)), tensors)


def requests_of(work: Workload, mode: str, k: int, noise_mode: str = "one_sided") -> list[GroupRequest]:
    return [
        GroupRequest(
            group_uid=str(i),
            problem_uid=f"bench/{i}",
            task="bench",
            prompt_ids=prompt,
            sample_indices=tuple(range(work.samples)),
            sampling=SamplingSettings(
                mode=mode, max_tokens=int(length), temperature=TEMPERATURE, top_p=TOP_P, top_k=TOP_K, k=k,
                noise_mode=noise_mode,
            ),
            purpose="training",
            epoch=0,
            run_seed=0,
            verifier="number",
            gold_answer="",
        )
        for i, (prompt, length) in enumerate(zip(work.prompts, work.lengths, strict=True))
    ]  # fmt: skip


class _OwnLength(StoppingCriteria):
    """Each row of `generate` is done at its own length."""

    def __init__(self, prompt: int, lengths: np.ndarray) -> None:
        self._until = torch.from_numpy(prompt + lengths)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: object) -> torch.Tensor:
        return input_ids.shape[1] >= self._until


def run_generate(model: PreTrainedModel, work: Workload) -> float:
    prompt_ids = torch.from_numpy(work.prompts).long()
    lengths = np.repeat(work.lengths, work.samples)
    model.generate(
        prompt_ids,
        attention_mask=torch.ones_like(prompt_ids),
        do_sample=True,
        temperature=TEMPERATURE,
        top_p=TOP_P,
        top_k=TOP_K,
        num_return_sequences=work.samples,
        max_new_tokens=int(work.lengths.max()),
        stopping_criteria=[_OwnLength(prompt_ids.shape[1], lengths)],
    )
    return work.tokens


def run_engine(engine: LatentEngine, requests: list[GroupRequest]) -> float:
    return float(sum(t.num_steps for group in generate(engine, requests) for t in group))


@contextmanager
def forward_share(model: PreTrainedModel) -> Iterator[Callable[[], float]]:
    """Seconds that the model itself (body and head) has taken inside the block, for its share of the whole."""
    spent = [0.0]
    replaced = []

    def timed(module: torch.nn.Module) -> None:
        forward = module.forward

        def wrapper(*arguments, **options):
            began = time.process_time()
            try:
                return forward(*arguments, **options)
            finally:
                spent[0] += time.process_time() - began

        module.forward = wrapper
        replaced.append(module)

    timed(model.base_model)
    timed(model.get_output_embeddings())
    try:
        yield lambda: spent[0]
    finally:
        for module in replaced:
            del module.forward


def workloads(vocabulary: int, rng: np.random.Generator) -> list[Workload]:
    """The three cases of the comparison with `generate`."""

    def prompts(count: int, length: int) -> np.ndarray:
        return rng.integers(2, vocabulary, (count, length)).astype(np.int32)

    full = np.full(64, RESPONSE)
    ragged = rng.permutation(np.linspace(RESPONSE // 8, RESPONSE, 64).round().astype(int))
    return [
        Workload(name="64 rows, equal lengths", prompts=prompts(64, 32), samples=1, lengths=full),
        Workload(name="64 rows, 8 to 64 steps", prompts=prompts(64, 32), samples=1, lengths=ragged),
        Workload(name="8 prompts of 200, G = 8", prompts=prompts(8, 200), samples=8, lengths=full[:8]),
    ]


GOALS = (">= 1.0", ">= 1.5", ">= 1.5")


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutBench:
    model: str
    rows: list[Row]
    forward_shares: dict[str, float]  # kind of step -> share of the model's own forward passes in the whole
    note: str = ""  # why rows are missing


def measure(*, vocabulary: int, hidden: int, layers: int, k: int, repeats: int) -> RolloutBench:
    """Ours against `generate`, latent against hard steps, and what is not the model's own work; the same in vLLM."""
    from deploy.bench.rollout_vllm import measure_vllm, vllm_missing

    torch.set_num_threads(1)
    model = bench_model(vocabulary, hidden, layers)
    engine = TransformersEngine(model, facts_of(model), max_rows=64)
    load_own_weights(engine, model)
    rows = []
    cases = workloads(vocabulary, np.random.default_rng(0))
    for work, goal in zip(cases, GOALS, strict=True):
        visible = requests_of(work, "visible", k)
        found = interleaved(
            {
                "ours": lambda visible=visible: run_engine(engine, visible),
                "generate": lambda work=work: run_generate(model, work),
            },
            repeats,
        )
        rows.append(compared(f"hard steps, {work.name}: ours to generate", found["ours"], found["generate"], goal))
    equal = cases[0]
    kinds = {
        "hard": requests_of(equal, "visible", k),
        "latent": requests_of(equal, "latent", k),
        "latent, noise off": requests_of(equal, "latent", k, "off"),
    }
    found = interleaved({n: lambda r=r: run_engine(engine, r) for n, r in kinds.items()}, repeats)
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


def compared(what: str, first: Timing, second: Timing, goal: str) -> Row:
    return Row(what=what, rates=(first.per_second, second.per_second), ratio=first.ratio_to(second), goal=goal)


def show(found: RolloutBench, console: Console | None = None) -> None:
    table = Table("tokens per CPU second", "first", "second", "ratio", "goal", title=f"bench rollout: {found.model}")
    for row in found.rows:
        table.add_row(row.what, *(f"{rate:,.0f}" for rate in row.rates), f"{row.ratio:.2f}", row.goal)
    console = console or Console()
    console.print(table)
    shares = ", ".join(f"{name} {share:.0%}" for name, share in found.forward_shares.items())
    console.print(f"share of the model's own forward passes: {shares}")
    if found.note:
        console.print(found.note, soft_wrap=True)


def write_json(found: RolloutBench, path: Path) -> None:
    path.write_text(json.dumps(asdict(found), indent=2) + "\n", encoding="utf-8")
