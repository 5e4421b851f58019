"""`latent-grpo bench gpu`: the numbers of one GPU, part by part, in order of worth, within a given time.

    product  float32 logits of bfloat16 weights: by the device's product and by float32 copies
    sampler  a latent step's draw against a sort of the whole vocabulary, V = 151,936
    decode   response steps per second of the Transformers engine, latent and visible
    replay   the learner's log-probs: forward, and forward and backward, with the model FLOPs utilisation
    publish  full weights to host memory, fingerprinted, and back into an engine

Models have random weights and the shapes of SmolLM2-135M and Llama-3.2-1B. Each finished part is printed and, with a
folder, written as one JSON file at once, so that a run that is cut off still gives something. On a CPU the same code
runs with small shapes, and its numbers mean nothing.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.text import Text
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from latent_grpo.common.fingerprint import fingerprint
from latent_grpo.common.head import Float32Head, float32_product_is_native
from latent_grpo.common.latent import latent_step, sample_mixture
from latent_grpo.common.pinned_copy import copy_between
from latent_grpo.common.schema import TrajectoryBatch, encode
from latent_grpo.common.terminal_text import TextConsole
from latent_grpo.common.types import PolicyVersion
from latent_grpo.common.weights import combine_checksums
from latent_grpo.deploy.bench.rollout import run_generate
from latent_grpo.deploy.bench.workload import (
    Workload,
    facts_of,
    load_own_weights,
    random_trajectory,
    requests_of,
    run_engine,
)
from latent_grpo.learner.batching import ReplayInputs, collate
from latent_grpo.learner.cost import peak_flops
from latent_grpo.learner.logprobs import step_log_probs
from latent_grpo.learner.policy import PolicyModule
from latent_grpo.rollout_workers.engine import EngineError
from latent_grpo.rollout_workers.step_graphs import capture_on_cuda
from latent_grpo.rollout_workers.transformers_engine import TransformersEngine

K = 10
BUCKET_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A Llama's shape."""

    name: str
    vocabulary: int
    hidden: int
    inner: int
    layers: int
    heads: int
    key_heads: int

    def model(self, device: torch.device | str, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
        """Makes a tied model with random weights on the device."""
        config = LlamaConfig(
            vocab_size=self.vocabulary, hidden_size=self.hidden, intermediate_size=self.inner,
            num_hidden_layers=self.layers, num_attention_heads=self.heads, num_key_value_heads=self.key_heads,
            head_dim=64, max_position_embeddings=4096, tie_word_embeddings=True, initializer_range=0.02,
            bos_token_id=None, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        with torch.device(device), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model: PreTrainedModel = LlamaForCausalLM(config).eval()
            return model.to(dtype)  # type: ignore[arg-type]  # transformers' `to` loses its self

    def layer_flops(self, tokens: int, length: int) -> float:
        """FLOPs of a forward pass of the layers over `tokens` in sequences of `length`: products, causal attention."""
        attention = 4 * self.hidden * 64 * (self.heads + self.key_heads) + 4 * length / 2 * self.heads * 64
        return float(tokens * self.layers * (attention + 6 * self.hidden * self.inner))

    def head_flops(self, positions: int) -> float:
        """FLOPs of a forward pass of the output layer, which only response steps need."""
        return 2.0 * positions * self.hidden * self.vocabulary

    def replay_flops(self, tokens: int, length: int, positions: int, *, gradient: bool) -> float:
        """Model FLOPs of a replay (`learner.policy.PolicyModule`) of `positions` response steps.

        With a gradient: that of the layers' weights and inputs is twice their forward pass; the frozen tied output
        layer has one of its inputs alone.
        """
        layers, head = self.layer_flops(tokens, length), self.head_flops(positions)
        return 3 * layers + 2 * head if gradient else layers + head


SMALL = Shape(name="135M", vocabulary=49_152, hidden=576, inner=1536, layers=30, heads=9, key_heads=3)
LARGE = Shape(name="1B", vocabulary=128_256, hidden=2048, inner=8192, layers=16, heads=32, key_heads=8)
TINY = Shape(name="tiny", vocabulary=512, hidden=64, inner=128, layers=2, heads=1, key_heads=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How much work the parts do: on a GPU, or just enough to run every line on a CPU."""

    shapes: tuple[Shape, ...]
    sampled: tuple[tuple[int, int], ...]  # vocabulary, rows
    rows: tuple[int, ...]  # samples decoded side by side
    response: int
    prompt: int
    replayed: int  # rows of one replay
    repeats: int


ON_GPU = Sizes(
    shapes=(SMALL, LARGE), sampled=((151_936, 64), (151_936, 256), (49_152, 256)), rows=(64, 256), response=64,
    prompt=128, replayed=64, repeats=10,
)  # fmt: skip
ON_CPU = Sizes(shapes=(TINY,), sampled=((2_000, 8),), rows=(4,), response=6, prompt=8, replayed=4, repeats=1)


class _Clock:
    """Wall-clock seconds of work on a device."""

    def __init__(self, device: torch.device, repeats: int):
        self._device, self._repeats = device, repeats

    def seconds(self, work: Callable[[], object]) -> float:
        """Returns the median over the repeats, after one run that warms up."""
        work()
        found = []
        for _ in range(self._repeats):
            self._wait()
            began = time.perf_counter()
            work()
            self._wait()
            found.append(time.perf_counter() - began)
        return float(np.median(found))

    def at_most(self, repeats: int) -> _Clock:
        """Returns a clock for work that takes long."""
        return _Clock(self._device, min(self._repeats, repeats))

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


Found = dict[str, float | bool | None]
"""The numbers of a part, by name; the unit is at the name's end."""


def measure(
    minutes: float, folder: Path | None = None, device: str = "auto", console: Console | None = None
) -> dict[str, Found]:
    """Runs the parts until the time is up and returns their numbers; a part that has begun is finished.

    With `folder`, each finished part is written there as `NAME.json`, beside the facts of the machine.
    """
    console = console or TextConsole()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    place, deadline = torch.device(device), time.monotonic() + 60 * minutes
    sizes = ON_GPU if place.type == "cuda" else ON_CPU
    facts = machine(place)
    console.print(", ".join(f"{name} {value}" for name, value in facts.items()), soft_wrap=True)
    results: dict[str, Found] = {}
    for name, part in parts(place, sizes):
        if time.monotonic() > deadline:
            console.print(Text(f"{name}: not run, {minutes:g} minutes are over", "yellow"))
            continue
        began = time.perf_counter()
        results[name] = part()
        took = time.perf_counter() - began
        console.print(Text.assemble((name, "bold"), f" ({took:.0f} s)"))
        for key, value in results[name].items():
            console.print(f"  {key}: {_text(value)}", soft_wrap=True)
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            content = {"part": name, "machine": facts, "seconds": took, "found": results[name], "sizes": asdict(sizes)}
            (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return results


def _text(value: float | bool | None) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


def machine(device: torch.device) -> dict[str, str]:
    """Returns the device's name and the versions that decide its speed."""
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {"device": str(device), "card": card, "torch": torch.__version__, "cuda": str(torch.version.cuda)}


def parts(device: torch.device, sizes: Sizes) -> Iterator[tuple[str, Callable[[], Found]]]:
    """Yields the parts in order of worth."""
    clock = _Clock(device, sizes.repeats)
    yield "product", partial(product, device, sizes, clock)
    yield "sampler", partial(sampler, device, sizes, clock)
    for shape in sizes.shapes:
        for name, part in (("replay", replay), ("decode", decode), ("publish", publish)):
            yield f"{name}-{shape.name}", partial(part, device, sizes, shape, clock)


def product(device: torch.device, sizes: Sizes, clock: _Clock) -> Found:
    """Times the output layer's product with float32 logits by both of its ways, whichever is a run's."""
    found: Found = {}
    for shape in sizes.shapes:
        layer = torch.nn.Linear(shape.hidden, shape.vocabulary, bias=False).to(device, torch.bfloat16)
        hidden = torch.randn(sizes.replayed * sizes.response, shape.hidden, device=device).to(torch.bfloat16)
        copies, device_own = (partial(Float32Head(layer, native=native), hidden) for native in (False, True))
        with torch.no_grad():
            native = float32_product_is_native(hidden, layer.weight)
            found[f"{shape.name} native"] = native
            found[f"{shape.name} native ms"] = 1e3 * clock.seconds(device_own) if native else None
            found[f"{shape.name} by float32 copies ms"] = 1e3 * clock.seconds(copies)
            found[f"{shape.name} rounded to bfloat16 ms"] = 1e3 * clock.seconds(partial(_rounded, layer, hidden))
    return found


def _rounded(layer: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = layer(hidden).float()
    return logits


def sampler(device: torch.device, sizes: Sizes, clock: _Clock) -> Found:
    """Times a latent step's draw: this program's, and a sort of the whole vocabulary with noise for every id."""
    found: Found = {}
    for vocabulary, rows in sizes.sampled:
        logits = torch.randn(rows, vocabulary, device=device) * 3.5
        keys, steps = torch.arange(rows, device=device) + 2**40, torch.arange(rows, device=device)
        noise = torch.randn_like(logits)
        settings: dict[str, Any] = {"k": K, "top_p": 0.95, "noise_scale": 1.0, "tau": 1.0}
        ours = partial(latent_step, logits, keys, steps, **settings, end_id=0, noisy=True, one_sided=True, allowed=None)
        whole = partial(sample_mixture, logits, noise, **settings)
        name = f"V {vocabulary:,}, {rows} rows"
        found[f"{name} us"] = 1e6 * clock.seconds(ours)
        found[f"{name} full sort us"] = 1e6 * clock.seconds(whole)
    return found


def decode(device: torch.device, sizes: Sizes, shape: Shape, clock: _Clock) -> Found:
    """Times the Transformers engine, bfloat16: response steps per second, latent and visible, by each of its ways.

    Beside it stands `generate` with a static cache, not compiled. A way that fails has its error in place of numbers.
    """
    model = shape.model(device)
    ways: dict[str, dict[str, Any]] = {"asking": {"run_ahead": False}, "ahead": {"run_ahead": True}}
    if device.type == "cuda":
        ways["graphs"] = {"capture": capture_on_cuda(device)}
    found: Found = {}
    for rows in sizes.rows:
        work = _work(shape, sizes, rows)
        kinds = {"latent": requests_of(work, "latent", K), "visible": requests_of(work, "visible", K)}
        for way, options in ways.items():
            engine = TransformersEngine(model, facts_of(model), max_rows=rows, device=device, **options)
            load_own_weights(engine, model)
            try:
                for mode, requests in kinds.items():
                    seconds = clock.at_most(2).seconds(partial(run_engine, engine, requests))
                    found[f"{mode} {way} {rows} rows steps/s"] = work.tokens / seconds
                    found[f"{mode} {way} {rows} rows ms/step"] = 1e3 * seconds / sizes.response
            except (EngineError, RuntimeError) as error:  # the other ways' numbers are not lost with it
                found[f"{way} {rows} rows: {type(error).__name__}: {error}"] = False
            engine.close()
        seconds = clock.at_most(2).seconds(partial(run_generate, model, work, cache="static"))
        found[f"generate {rows} rows ms/step"] = 1e3 * seconds / sizes.response
    return found


def replay(device: torch.device, sizes: Sizes, shape: Shape, clock: _Clock) -> Found:
    """Times the learner's log-probs of a micro-batch, without and with gradient, bfloat16, embeddings frozen."""
    model = shape.model(device)
    policy, inputs = PolicyModule(model), replay_inputs(shape, sizes, device)
    tokens, length, positions = inputs.ids.numel(), inputs.ids.shape[1], len(inputs.rows)

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return step_log_probs(policy(inputs), inputs, weighting="mixture")

    def train() -> None:
        step_log_probs(policy(inputs), inputs, weighting="mixture").sum().backward()
        policy.zero_grad(set_to_none=True)

    found: Found = {"tokens": float(tokens), "response steps": float(positions)}
    peak = peak_flops(device)
    for name, work in (("forward", forward), ("forward and backward", train)):
        flops = shape.replay_flops(tokens, length, positions, gradient=work is train)
        seconds = clock.seconds(work)
        found[f"{name} ms"] = 1e3 * seconds
        found[f"{name} tokens/s"] = tokens / seconds
        found[f"{name} TFLOP/s"] = flops / seconds / 1e12
        found[f"{name} MFU"] = None if peak is None else flops / seconds / peak
    if device.type == "cuda":
        found["peak GiB"] = torch.cuda.max_memory_allocated(device) / 2**30
        torch.cuda.reset_peak_memory_stats(device)
    return found


def publish(device: torch.device, sizes: Sizes, shape: Shape, clock: _Clock) -> Found:
    """Times a publication: device to host memory, fingerprints on the device, and back into an engine, verified."""
    model = shape.model(device)
    engine = TransformersEngine(model, facts_of(model), max_rows=1, device=device)
    once = clock.at_most(3)
    kept: list[tuple[str, torch.Tensor]] = []

    def out() -> None:
        kept[:] = [(n, p.detach().to("cpu", copy=True)) for n, p in model.named_parameters()]

    def sums() -> list[str]:
        return [fingerprint(n, p.detach()) for n, p in model.named_parameters()]

    def pinned() -> None:
        for (_, parameter), (_, host) in zip(model.named_parameters(), kept, strict=True):
            copy_between(parameter.detach(), host, proven=True)

    packing, hashing = once.seconds(out), once.seconds(sums)
    through_pinned = once.seconds(pinned)
    exact = all(
        torch.equal(p.detach().cpu(), host) for (_, p), (_, host) in zip(model.named_parameters(), kept, strict=True)
    )
    version = PolicyVersion(version=1, checksum=combine_checksums(sums()))

    def back() -> None:
        engine.load_weights(version, kept)

    size = sum(p.nbytes for p in model.parameters())
    loading = once.seconds(back)
    return {
        "GiB": size / 2**30,
        "copy s": packing,
        "copy through pinned memory s": through_pinned,
        "exact through pinned memory": exact,
        "fingerprint s": hashing,
        "verify and load s": loading,
        "GiB/s out": size / 2**30 / packing,
        "GiB/s in": size / 2**30 / loading,
    }


def replay_inputs(shape: Shape, sizes: Sizes, device: torch.device | str) -> ReplayInputs:
    """Makes a micro-batch of trajectories with random ids, half of whose steps are latent."""
    draw, latents = np.random.default_rng(0), sizes.response // 2
    rows = [
        random_trajectory(
            draw,
            draw.integers(1, shape.vocabulary, sizes.prompt),
            latents=latents,
            hard=sizes.response - latents,
            k=K,
            vocabulary=shape.vocabulary,
            group=row,
            sample=0,
        )
        for row in range(sizes.replayed)
    ]
    return collate(TrajectoryBatch(encode(rows, K)), [(row,) for row in range(len(rows))], chunks=4).to(device)


def _work(shape: Shape, sizes: Sizes, rows: int) -> Workload:
    prompts = np.random.default_rng(0).integers(2, shape.vocabulary, (rows, sizes.prompt)).astype(np.int32)
    return Workload(name=f"{rows} rows", prompts=prompts, samples=1, lengths=np.full(rows, sizes.response))
