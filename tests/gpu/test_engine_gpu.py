"""The Transformers engine on a GPU: its records, its agreement with the learner's policy, its memory.

The model's logits are as large as a real one's, so that bfloat16 is tried where it is hardest.
"""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch
from engine_driving import Check, collect, published
from large_logits import FACTS, K, component_gaps, large_logits, make_model, request
from step_recorder import StepRecorder

from latent_grpo.common.agreement import TOLERANCES, Gap
from latent_grpo.common.head import Float32Head, float32_product_is_native
from latent_grpo.common.latent import latent_step, sample_mixture
from latent_grpo.common.noise import gumbel_noise
from latent_grpo.common.pinned_copy import PinnedCopies
from latent_grpo.rollout_workers.step_graphs import capture_on_cuda
from latent_grpo.rollout_workers.transformers_engine import TransformersEngine

pytestmark = pytest.mark.gpu
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
NEAR_TIE = {"float32": 1e-3, "bfloat16": 0.3}  # log-probs that rounding may move against each other


def asked():
    """Every noise mode side by side, and other settings beside them."""
    modes = [{}, {"noise_mode": "two_sided"}, {"noise_mode": "off"}, {"k": 4, "top_p": 0.8}]
    visible = [{"mode": "visible"}, {"mode": "visible", "top_k": 200, "top_p": 1.0}]
    return [request(i, **settings) for i, settings in enumerate([*modes, *visible])]


@pytest.mark.parametrize("way", ["asking", "run_ahead", "graphs"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_records_are_drawn_again_teacher_forced(device, dtype, way):
    model = large_logits(DTYPES[dtype]).to(device)
    options = {"run_ahead": way != "asking"}
    if way == "graphs":
        options["capture"] = capture_on_cuda(device) if device.type == "cuda" else StepRecorder()
    engine = TransformersEngine(model, FACTS, max_rows=32, device=device, **options)
    engine.load_weights(*published(model))
    requests = asked()
    groups = collect(engine, requests)
    engine.close()
    found = Check(FACTS, NEAR_TIE[dtype]).redrawn(model, requests, groups)
    gap = Gap.of(np.array(found.latent_gaps + found.hard_gaps))
    print(f"{device} {dtype}: {found.alike / found.steps:.2%} of {found.steps:,} steps drawn again alike; gap {gap}")
    assert found.steps > 300
    assert TOLERANCES[dtype].exceeded(gap) is None


def test_graphs_are_captured_again_once_memory_has_moved(cuda):
    """Longer samples, an abort and other weights: each drops or keeps the graphs of before."""
    model = make_model().to(cuda)
    engine = TransformersEngine(model, FACTS, max_rows=32, device=cuda, capture=capture_on_cuda(cuda))
    plain = TransformersEngine(make_model().to(cuda), FACTS, max_rows=32, device=cuda)
    for e in (engine, plain):
        e.load_weights(*published(model))
    for i in range(3):
        asked_now = [request(i, max_tokens=20 * (i + 1)), request(i + 10, max_tokens=20 * (i + 1))]
        found, expected = collect(engine, asked_now), collect(plain, asked_now)
        for uid, group in expected.items():
            alike = [np.array_equal(a.hard_ids, b.hard_ids) for a, b in zip(found[uid], group, strict=True)]
            assert np.mean(alike) >= 0.5, "more than near-ties differ"
        engine.add(request(100 + i))
        engine.step()
        engine.abort()


@pytest.mark.parametrize("dtype", DTYPES)
def test_engine_and_learner_agree_within_the_self_tests_bounds(device, dtype):
    sampling, training = (large_logits(DTYPES[dtype]).to(device) for _ in range(2))
    gap = Gap.of(component_gaps(sampling, training, device)[0])
    print(f"{device} {dtype}: {gap}")
    assert TOLERANCES[dtype].exceeded(gap) is None


def test_draws_are_those_of_the_cpu(device):
    """The same logits and keys give the same noise and the same ids, whatever the device (METHOD §2.5)."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(256, 4096, generator=generator) * 3.5
    keys, steps = torch.randint(2**62, (256,), generator=generator), torch.arange(256)
    ids = torch.arange(4096).expand(256, -1)
    here = gumbel_noise(keys.to(device), steps.to(device), ids.to(device)).cpu()
    torch.testing.assert_close(here, gumbel_noise(keys, steps, ids), rtol=1e-5, atol=1e-5)
    settings = {"k": K, "top_p": 0.95, "noise_scale": 1.0, "tau": 1.0, "end_id": 5}
    plain = latent_step(logits, keys, steps, **settings, noisy=True, one_sided=True, allowed=None)
    other = latent_step(
        logits.to(device), keys.to(device), steps.to(device), **settings, noisy=True, one_sided=True, allowed=None
    )
    assert (other.ids.cpu() == plain.ids).all(-1).float().mean() > 0.99, "more than near-ties differ"
    torch.testing.assert_close(other.scores.cpu(), plain.scores, rtol=1e-4, atol=1e-4)


def test_the_fast_sampler_is_the_full_sort(device):
    """On the device, with the same draws: ids and scores are equal, not close."""
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(64, 20_000, generator=generator) * 3.5).to(device)
    keys, steps = torch.randint(2**62, (64,), generator=generator).to(device), torch.arange(64).to(device)
    fast = latent_step(
        logits, keys, steps, k=K, top_p=0.95, noise_scale=1.0, tau=1.0, end_id=19_999, noisy=True, one_sided=True,
        allowed=None,
    )  # fmt: skip
    noise = gumbel_noise(keys, steps, torch.arange(20_000, device=device).expand(64, -1))
    ids, scores, _ = sample_mixture(logits, noise, k=K, top_p=0.95, noise_scale=1.0, tau=1.0)
    assert torch.equal(fast.ids, ids)
    assert torch.equal(fast.scores, scores)


@pytest.mark.parametrize("native", [False, True], ids=["copies", "native"])
def test_bfloat16_logits_are_float32_and_so_are_their_gradients_sums(device, native):
    """By float32 copies, and by torch's product with a float32 result where the device has it, both ways."""
    layer = torch.nn.Linear(576, 4096, bias=False).to(device, torch.bfloat16)
    hidden = torch.randn(64, 576, device=device, dtype=torch.bfloat16).requires_grad_()
    found = Float32Head(layer, native=native)(hidden)
    outer = torch.randn_like(found)
    found.backward(outer)
    wide, states = layer.weight.detach().float(), hidden.detach().float()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.detach(), states @ wide.T, rtol=1e-4, atol=1e-3)
    for gradient, expected in ((hidden.grad, outer @ wide), (layer.weight.grad, outer.T @ states)):
        assert ((gradient.float() - expected).norm() / expected.norm()) < 6e-3, "worse than rounding to bfloat16"


def test_cuda_multiplies_without_float32_copies(cuda):
    weight = torch.zeros(64, 64, device=cuda, dtype=torch.bfloat16)
    assert float32_product_is_native(weight, weight), "this torch or card has no bfloat16 product with float32 output"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8], ids=str)
def test_copies_through_pinned_memory_bring_every_byte(cuda, dtype):
    copies = PinnedCopies(cuda, piece_bytes=2**20)
    for size in (1, 2**18 + 3, 2**21 + 5):  # less than a piece, and several that are not full
        source = torch.randint(0, 100, (size,)).to(dtype)
        there, back = torch.zeros_like(source, device=cuda), torch.zeros_like(source)
        copies.copy(source, there)
        copies.copy(there, back)
        assert torch.equal(there.cpu(), source)
        assert torch.equal(back, source)


def test_memory_returns_when_an_engine_is_closed_and_dropped(cuda):
    gc.collect()
    before = torch.cuda.memory_allocated(cuda)
    model = make_model().to(cuda)
    engine = TransformersEngine(model, FACTS, max_rows=256, device=cuda)
    engine.load_weights(*published(model))
    collect(engine, [request(i) for i in range(8)])
    filled = torch.cuda.memory_allocated(cuda)
    engine.close()
    closed = torch.cuda.memory_allocated(cuda)
    weights = sum(p.nbytes for p in model.parameters())
    assert closed <= before + weights + 2 * 2**20 + 256 * 4, f"{closed - before - weights:,} bytes left after close"
    assert closed < filled
    del engine, model
    gc.collect()
    assert torch.cuda.memory_allocated(cuda) <= before + 2**20
