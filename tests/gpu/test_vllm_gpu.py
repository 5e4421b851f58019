"""The vLLM engine on CUDA (`make test-gpu`): correctness first, then the numbers of docs/vllm.md, printed.

Nothing here has been run yet: no GPU was at hand. The latent core is the one that the CPU tests cover; what is new on
a GPU is vLLM's V2 runner, CUDA graphs, bfloat16 and draws that never wait for the device.
"""

from __future__ import annotations

import tempfile
import time

import numpy as np
import pytest
import torch

from common.latent import sample_mixture
from common.types import GroupRequest, PolicyVersion, SamplingSettings, TokenFacts
from common.weights import checksum
from rollout_workers.engine import generate
from rollout_workers.rows import SETTINGS, write_settings
from rollout_workers.vllm_plugin.core import LatentCore
from rollout_workers.vllm_plugin.settings import KEY, extra_args

pytestmark = [pytest.mark.gpu]
VOCAB, END, EOS, K = 32_000, 5, 1, 10
FACTS = TokenFacts(vocab_size=VOCAB, allowed=np.ones(VOCAB, bool), latent_end_id=END, eos_ids=(EOS,), pad_id=0)


def make_model(dtype, hidden=512, layers=4):
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
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


def vllm_rollouts(model, dtype, requests, **options):
    """(groups, seconds of the second of two equal passes)."""
    from common.config import VLLMConfig
    from rollout_workers.vllm_engine import VLLMEngine

    folder = tempfile.mkdtemp(prefix="lgg-")
    model.save_pretrained(folder)
    rows = sum(len(r.sample_indices) for r in requests)
    engine = VLLMEngine(folder, FACTS, dtype=dtype, max_rows=rows, options=VLLMConfig(memory_share=0.5, **options))
    tensors = [(n, p.detach().cpu()) for n, p in model.named_parameters()]
    engine.load_weights(PolicyVersion(version=1, checksum=checksum(tensors)), tensors)
    list(generate(engine, requests))
    began = time.perf_counter()
    groups = {g[0].group_uid: g for g in generate(engine, requests)}
    seconds = time.perf_counter() - began
    assert not engine._ask("forget", [])[0], "state of finished samples is kept"
    engine.close()
    return groups, seconds


@torch.no_grad()
def replayed_gaps(model, groups):
    """|recorded - replayed| log-probs of latent components and hard steps: Transformers on the record's own history."""
    embed, latent, hard = model.get_input_embeddings().weight, [], []
    for group in groups.values():
        for t in group:
            ids, scores = torch.tensor(t.latent_ids).long().cuda(), torch.tensor(t.latent_scores).cuda()
            mixed = (torch.softmax(scores / t.sampling.tau, -1)[..., None] * embed[ids].float()).sum(-2).to(embed.dtype)
            parts = (
                embed[torch.tensor(t.prompt_ids).long().cuda()],
                mixed,
                embed[torch.tensor(t.hard_ids).long().cuda()],
            )
            logits = model(inputs_embeds=torch.cat(parts)[None, :-1]).logits[0, len(t.prompt_ids) - 1 :].float()
            count = len(t.latent_ids)
            log_p = logits[:count].log_softmax(-1).gather(-1, ids)
            latent += (log_p - torch.tensor(t.latent_log_probs).cuda()).abs().flatten().tolist()
            ids = torch.tensor(t.hard_ids).long().cuda()[:, None]
            log_p = (logits[count:] / t.sampling.temperature).log_softmax(-1).gather(-1, ids)[:, 0]
            hard += (log_p - torch.tensor(t.hard_log_probs).cuda()).abs().tolist()
    return np.array(latent), np.array(hard)


@pytest.mark.vllm
@pytest.mark.parametrize(("dtype", "mean", "p99"), [("float32", 1e-4, 1e-3), ("bfloat16", 0.02, 0.2)])  # METHOD §6
@pytest.mark.parametrize("eager", [True, False])
def test_records_replay_in_transformers(dtype, mean, p99, eager):
    model = make_model(getattr(torch, dtype)).cuda()
    requests = [request(i) for i in range(6)]
    requests += [request(6, noise_mode="off"), request(7, mode="visible"), request(8, noise_mode="two_sided", k=4)]
    groups, _ = vllm_rollouts(model, dtype, requests, eager=eager)
    latent, hard = replayed_gaps(model, groups)
    graphs = "eager" if eager else "CUDA graphs"
    for name, gap in (("latent", latent), ("hard", hard)):
        largest = f"p99 {np.quantile(gap, 0.99):.2e} max {gap.max():.2e}"
        print(f"{dtype}, {graphs}: {name} gap of {len(gap)}: mean {gap.mean():.2e} {largest}")
        assert gap.mean() <= mean
        assert np.quantile(gap, 0.99) <= p99


@pytest.mark.vllm
@pytest.mark.parametrize("batch", [64, 256])
def test_tokens_per_second(batch):
    model = make_model(torch.bfloat16, hidden=1024, layers=8).cuda()
    requests = [request(i % 16 + 100 * i, max_tokens=256) for i in range(batch // 8)]
    groups, seconds = vllm_rollouts(model, "bfloat16", requests)
    steps = sum(t.num_steps for g in groups.values() for t in g)
    print(f"latent, batch {batch}, CUDA graphs: {steps / seconds:,.0f} tokens per second")


def running_core(batch, vocabulary, **sampling):
    core = LatentCore(torch.device("cuda"), slots=batch, steps=96, width=K, allowed=None, end_id=END, placeholder=END)
    group = request(0, samples=batch, **sampling)
    rows = np.zeros(batch, dtype=SETTINGS)
    write_settings(rows, group, 1)
    for uid, row in enumerate(rows):
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
