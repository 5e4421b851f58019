"""The vLLM engine on CUDA (`make test-gpu`): correctness first, then the numbers of docs/vllm.md, printed.

Nothing here has been run yet: no GPU was at hand. The decoder is the one that the CPU tests cover, and so are the
scenarios of `engine_driving`; what is new on a GPU is vLLM's V2 runner, CUDA graphs, bfloat16 and draws that never wait
for the device.
"""

from __future__ import annotations

import tempfile
import time

import numpy as np
import pytest
import torch
from engine_driving import (
    Check,
    collect,
    core_of,
    crowded_out,
    other_weights_equal_a_fresh_start,
    published,
    weights_in_flight,
)

from latent_grpo.common.latent import sample_mixture
from latent_grpo.common.types import GroupRequest, SamplingSettings, TokenFacts
from latent_grpo.rollout_workers.decoding import Decoder
from latent_grpo.rollout_workers.requests import sample_settings
from latent_grpo.rollout_workers.vllm_plugin.settings import KEY, extra_args

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="is about CUDA itself; the CPU has tests/contracts"),
]
VOCAB, END, EOS, K = 32_000, 5, 1, 10
FACTS = TokenFacts(vocab_size=VOCAB, allowed=np.ones(VOCAB, bool), latent_end_id=END, eos_ids=(EOS,), pad_id=0)
# dtype: (tolerance of a redrawn step, mean gap, p99 gap), all in log-prob. Logits of the model below reach 20, where
# bfloat16 has steps of 1/8. Of vLLM on CPU: mean 6e-6, p99 2e-5 in float32; mean 0.085, p99 0.29, max 0.54 in bfloat16.
PRECISION = {"float32": (1e-3, 1e-4, 1e-3), "bfloat16": (1.0, 0.15, 0.5)}
CHECK = Check(FACTS, tolerance=PRECISION["float32"][0], gap=1e-2)
CROWDED = 48 * 16 * 4 * 2 * 4 * 64 * 4  # bytes of 48 blocks of 16 positions in float32, where eight samples want 58


def make_model(dtype, hidden=512, layers=4, seed=0):
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 128, max_position_embeddings=1024,
        initializer_range=0.05,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(4.0)
    return model


def request(uid, samples=8, **sampling):
    return GroupRequest(
        group_uid=f"g{uid}", problem_uid=f"p{uid}", task="t",
        prompt_ids=np.random.default_rng(uid).integers(6, VOCAB, size=40 + uid).astype(np.int32),
        sample_indices=tuple(range(samples)),
        sampling=SamplingSettings(**{"mode": "latent", "max_tokens": 96, "k": K} | sampling),
        purpose="training", epoch=0, run_seed=3, verifier="v", gold_answer="",
    )  # fmt: skip


def start(model, version=3, dtype="float32", rows=64, max_length=256, in_flight_updates=False, **options):
    """A vLLM engine that holds the model."""
    from latent_grpo.common.config import VLLMConfig
    from latent_grpo.rollout_workers.vllm_engine import VLLMEngine

    folder = tempfile.mkdtemp(prefix="lgg-")
    model.save_pretrained(folder)
    options = VLLMConfig(**{"memory_share": 0.4, **options})
    engine = VLLMEngine(
        folder, FACTS, dtype=dtype, max_rows=rows, max_length=max_length, max_tokens=max_length, k=K, options=options,
        in_flight_updates=in_flight_updates,
    )  # fmt: skip
    engine.load_weights(*published(model, version))
    return engine


@pytest.mark.vllm
@pytest.mark.parametrize("dtype", PRECISION)
@pytest.mark.parametrize("eager", [True, False])
def test_records_are_redrawn_and_replay_in_transformers(dtype, eager):
    """Of every noise mode, side by side with the same k and top_p, and of other settings."""
    model = make_model(getattr(torch, dtype)).cuda()
    requests = [request(i) for i in range(6)]
    requests += [request(6, noise_mode="off"), request(7, noise_mode="two_sided"), request(8, mode="visible")]
    requests += [request(9, noise_mode="two_sided", k=4, top_p=0.8), request(10, mode="visible", top_k=200, top_p=1.0)]
    engine = start(model, dtype=dtype, rows=sum(len(r.sample_indices) for r in requests), eager=eager)
    groups = collect(engine, requests)
    assert not core_of(engine).slots, "state of finished samples is kept"
    engine.close()
    tolerance, mean, p99 = PRECISION[dtype]
    found = Check(FACTS, tolerance).redrawn(model, requests, groups)
    mode = f"{dtype}, {'eager' if eager else 'CUDA graphs'}"
    share = found.alike / found.steps
    print(f"{mode}: {share:.3%} of {found.steps:,} steps drawn again alike, near-ties within {tolerance} the others")
    for name, gap in (("latent", np.array(found.latent_gaps)), ("hard", np.array(found.hard_gaps))):
        largest = f"p99 {np.quantile(gap, 0.99):.2e} max {gap.max():.2e}"
        print(f"{mode}: {name} gap of {len(gap):,}: mean {gap.mean():.2e} {largest}")
        assert gap.mean() <= mean
        assert np.quantile(gap, 0.99) <= p99


@pytest.fixture
def models():
    """Two of the same shape."""
    return make_model(torch.float32).cuda(), make_model(torch.float32, seed=1).cuda()


@pytest.mark.vllm
def test_weights_loaded_behind_captured_graphs_are_those_that_sample(models):
    found = other_weights_equal_a_fresh_start(start, *models, [request(i) for i in range(4)], CHECK)
    assert found.steps > 2000


@pytest.mark.vllm
def test_weights_in_flight_recompute_what_running_samples_have(models):
    assert weights_in_flight(start, *models, [request(i) for i in range(4)], CHECK).steps > 1500


@pytest.mark.vllm
def test_preempted_samples_go_on_with_their_mixtures(models):
    engine = start(models[0], rows=8, max_length=160, kv_cache_bytes=CROWDED, engine_args={"block_size": 16})
    assert crowded_out(engine, models[0], [request(0)], CHECK, generated=16).steps > 500
    engine.close()


@pytest.mark.vllm
@pytest.mark.parametrize("batch", [64, 256])
def test_tokens_per_second(batch):
    model = make_model(torch.bfloat16, hidden=1024, layers=8).cuda()
    requests = [request(i % 16 + 100 * i, max_tokens=256) for i in range(batch // 8)]
    engine = start(model, dtype="bfloat16", rows=batch, max_length=512)
    collect(engine, requests)
    engine.load_weights(*published(model, version=4))  # drops the prompts' keys and values
    began = time.perf_counter()
    groups = collect(engine, requests)
    seconds = time.perf_counter() - began
    engine.close()
    steps = sum(t.num_steps for g in groups.values() for t in g)
    print(f"latent, batch {batch}, CUDA graphs: {steps / seconds:,.0f} tokens per second")


def running_core(batch, vocabulary, **sampling):
    core = Decoder(torch.device("cuda"), slots=batch, steps=96, width=K, allowed=None, end_id=END, placeholder=END)
    group = request(0, samples=batch, **sampling)
    for uid, row in enumerate(sample_settings(group, 1)):
        settings = dict(extra_args(uid, row, False)[KEY])
        core.add(settings.pop("uid"), 8, settings)
    return core, np.array([core.slots[uid] for uid in range(batch)])


def test_draws_and_mixtures_never_wait_for_the_device():
    core, slots = running_core(64, VOCAB)
    embedding = torch.randn(VOCAB, 256, device="cuda", dtype=torch.bfloat16)
    logits = torch.randn(64, VOCAB, device="cuda") * 4
    complete = torch.ones(64, dtype=torch.bool, device="cuda")
    inputs = torch.zeros(64, 256, device="cuda", dtype=torch.bfloat16)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(8):
            at = torch.full((64,), 7, device="cuda") + step
            core.draw(logits, slots, at, complete)
            places, owners = core.generated_rows(slots, np.full(64, 8 + step), np.arange(65))
            core.feed(inputs, places, owners, at + 1, lambda ids: torch.nn.functional.embedding(ids, embedding))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("vocabulary", [128_256, 151_936])
@pytest.mark.parametrize("batch", [64, 256])
def test_sampler_microseconds_per_step(vocabulary, batch):
    core, slots = running_core(batch, vocabulary)
    logits = torch.randn(batch, vocabulary, device="cuda") * 3.5
    complete = torch.ones(batch, dtype=torch.bool, device="cuda")
    at = torch.full((batch,), 7, device="cuda")
    noise = torch.randn_like(logits)

    def ours():
        core.draw(logits, slots, at, complete)

    def full_sort():
        sample_mixture(logits, noise, k=K, top_p=0.95, noise_scale=1.0, tau=1.0)

    found = {}
    for name, run in (("ours", ours), ("full sort", full_sort)):
        for _ in range(5):
            run()
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(30):
            run()
        torch.cuda.synchronize()
        found[name] = (time.perf_counter() - began) / 30 * 1e6
    print(f"V {vocabulary:,}, batch {batch}: {found['ours']:,.0f} us, over all ids {found['full sort']:,.0f} us")
    assert found["ours"] < found["full sort"]
