"""`bench gpu` runs whole on a CPU, and its models and FLOPs are those of the shapes that it names."""

import json

import numpy as np
import pytest
import torch
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

from latent_grpo.common.head import install_float32_head
from latent_grpo.deploy.bench.gpu import LARGE, ON_CPU, ON_GPU, SMALL, TINY, Shape, measure, parts, replay_inputs
from latent_grpo.learner.cost import ModelFlops
from latent_grpo.learner.logprobs import selected_log_probs, step_log_probs
from latent_grpo.learner.policy import PolicyModule, transformer_layers

QUIET = Console(quiet=True)


def test_every_part_runs_and_is_written_when_it_is_finished(tmp_path):
    found = measure(minutes=5.0, folder=tmp_path, device="cpu", console=QUIET)
    wanted = ["product", "sampler", "replay-tiny", "decode-tiny", "publish-tiny"]
    assert list(found) == wanted
    for name in wanted:
        written = json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8"))
        assert written["found"] == found[name]
        assert written["machine"]["device"] == "cpu"
        assert all(value > 0 for value in found[name].values() if isinstance(value, float))


def test_no_part_begins_when_the_time_is_over(tmp_path):
    assert measure(minutes=0.0, folder=tmp_path, device="cpu", console=QUIET) == {}
    assert list(tmp_path.iterdir()) == []


def test_a_gpu_gets_both_models_and_the_vocabulary_of_the_issue():
    names = [name for name, _ in parts(torch.device("meta"), ON_GPU)]
    assert names[:2] == ["product", "sampler"]
    assert {"replay-135M", "replay-1B", "decode-135M", "decode-1B", "publish-135M", "publish-1B"} < set(names)
    assert 151_936 in {vocabulary for vocabulary, _ in ON_GPU.sampled}


@pytest.mark.parametrize(("shape", "millions"), [(SMALL, 134.5), (LARGE, 1235.8)])
def test_the_shapes_have_the_sizes_of_their_names(shape, millions):
    model = shape.model("meta")
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=1e-3)


GROUPED = Shape(name="grouped", vocabulary=700, hidden=192, inner=320, layers=3, heads=6, key_heads=2)


@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "backward too"])
@pytest.mark.parametrize("shape", [TINY, GROUPED], ids=lambda shape: shape.name)
def test_the_flops_are_those_that_torch_counts_of_the_learners_pass(shape, gradient):
    """Torch counts eager attention over all pairs of positions, of which a causal model needs half."""
    model = shape.model("cpu", torch.float32)
    model.set_attn_implementation("eager")
    policy, inputs = PolicyModule(model), replay_inputs(shape, ON_CPU, "cpu")
    (rows, length), positions = inputs.ids.shape, len(inputs.rows)
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(gradient):
        log_probs = step_log_probs(policy(inputs), inputs, weighting="mixture")
        if gradient:
            log_probs.sum().backward()
    assert positions == rows * ON_CPU.response < rows * length
    half = shape.layers * rows * length * 2 * length * shape.heads * 64 * (3 if gradient else 1)
    expected = shape.replay_flops(rows * length, length, positions, gradient=gradient)
    assert expected + half == pytest.approx(counter.get_total_flops(), rel=0.001)


@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "backward too"])
@pytest.mark.parametrize("shape", [TINY, GROUPED, SMALL], ids=lambda shape: shape.name)
def test_the_learners_own_count_is_the_same_and_knows_what_is_frozen_and_shared(shape, gradient):
    model = shape.model("meta")
    PolicyModule(model)  # freezes the embeddings, and the output layer that is tied to them
    flops = ModelFlops.of(model)
    prompts, fed = np.array([20, 20]), [np.array([7]), np.array([7])]
    alone = flops.count(prompts, fed, 16, gradient=gradient)
    assert alone == pytest.approx(shape.replay_flops(54, 27, 16, gradient=gradient))
    shared = flops.count(prompts[:1], [np.array([7, 7])], 16, gradient=gradient)
    passes = 3 if gradient else 1
    assert alone - shared == pytest.approx(passes * shape.layer_flops(20, 20))
    for layer in transformer_layers(model)[:1]:
        layer.requires_grad_(False)
    lower = ModelFlops.of(model).count(prompts, fed, 16, gradient=gradient)
    assert alone - lower == pytest.approx((2 if gradient else 0) * shape.layer_flops(54, 27) / shape.layers)


@pytest.mark.parametrize("shape", [SMALL, LARGE], ids=lambda shape: shape.name)
def test_the_log_probs_of_the_real_shapes_need_no_device(shape):
    """On the device `meta` every shape and dtype of the output layer's way is computed, and no number."""
    model = shape.model("meta")
    head, positions = install_float32_head(model), 300
    hidden = torch.zeros(positions, shape.hidden, dtype=torch.bfloat16, device="meta", requires_grad=True)
    ids = torch.zeros(positions, 10, dtype=torch.long, device="meta")
    log_probs = selected_log_probs(head, hidden, ids, torch.ones(positions, device="meta"), chunks=4)
    assert (log_probs.dtype, log_probs.shape) == (torch.float32, (positions, 10))
    log_probs.sum().backward()
    assert hidden.grad.dtype == head.weight.grad.dtype == torch.bfloat16
