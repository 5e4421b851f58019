"""The learner on a GPU, behind Ray and DeepSpeed: gradients of every ZeRO stage, publication, checkpoints, memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from engine_driving import collect
from plain_learner import GROUPS, K, load, make_batch, plain_step, published, save_small_model, settings

from latent_grpo.common.prompts import resolve_tokens
from latent_grpo.common.tasks.arithmetic import make_arithmetic_tokenizer
from latent_grpo.common.types import GroupRequest, PolicyVersion, SamplingSettings
from latent_grpo.common.weights import checksum
from latent_grpo.learner.learner import LearnerGroup
from latent_grpo.rollout_workers.transformers_engine import TransformersEngine

pytestmark = [pytest.mark.gpu, pytest.mark.integration]
PROBE = 1e3  # an AdamW whose eps dwarfs every gradient moves a parameter by -lr / eps times its gradient
ERROR = {"float32": 1e-4, "bfloat16": 3e-2}
"""Relative L2 of a tensor's gradient. The reference adds one row after the other on the CPU; in bfloat16 each row's
gradient and the published parameter are rounded (2^-9 each), and a hidden state may round to its other neighbour."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_small_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def batch(folder):
    return make_batch(folder)


def learner_settings(shares, stage, dtype, **changes):
    resources = {"num_cpus": 0.5, "num_gpus": shares["learner"]}
    learner = {"ranks": 1, "zero_stage": stage, "tokens_per_microbatch": 40, "logprob_chunk_tokens": 7}
    model = {"path": "unused", "dtype": dtype}
    return settings(learner=learner | {"resources": resources}, model=model, **changes)


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("dtype", ERROR)
def test_the_gradient_of_each_tensor_is_that_of_plain_torch(ray_session, shares, folder, batch, dtype, stage):
    optimizer = {"lr": 1e6 * PROBE, "eps": 1e6, "grad_clip": 1e9, "weight_decay": 0.0}
    config = learner_settings(shares, stage, dtype, optimizer=optimizer, minibatch_prompts=GROUPS)
    expected, _ = plain_step(folder, config, batch)
    group = LearnerGroup(config, folder)
    try:
        gaps = group.replay(batch)
        report = group.train(batch, 0)
        after = published(group)
    finally:
        group.close()
    assert report.metrics["learner/skipped_updates"] == 0
    assert gaps.hard.mean < (1e-4 if dtype == "float32" else 0.05)
    errors = {}
    for name, parameter in load(folder, dtype).named_parameters():
        want, got = ((weights[name].double() - parameter.detach().double()) / PROBE for weights in (expected, after))
        if name == "model.embed_tokens.weight":
            assert not got.any(), "embeddings are frozen"
        else:
            errors[name] = float((want - got).norm() / want.norm())
    print(f"{dtype} ZeRO {stage}: largest relative error {max(errors.values()):.1e}")
    assert max(errors.values()) < ERROR[dtype], errors


@pytest.mark.parametrize("dtype", ERROR)
def test_weights_are_published_sampled_from_saved_and_resumed(
    ray_session, device, shares, folder, batch, dtype, tmp_path
):
    group = LearnerGroup(learner_settings(shares, 2, dtype), folder)
    try:
        group.train(batch, 0)
        group.save(tmp_path / "state")
        one = published(group)
        group.train(batch, 1)
        two = published(group)
        group.load(tmp_path / "state")
        again = published(group)
        group.train(batch, 1)
        resumed = published(group)
    finally:
        group.close()
    assert {t.dtype for t in one.values()} == {getattr(torch, dtype)}
    assert checksum(again.items()) == checksum(one.items()), "a loaded state is the saved one, bit for bit"
    assert checksum(two.items()) != checksum(one.items())
    error = distance(two, resumed) / distance(two, one)
    print(f"{device} {dtype}: the resumed step differs by {error:.1e} of the step")
    assert error <= (0.0 if device.type == "cpu" else 1e-2), "the resumed step is another one"

    tokenizer = make_arithmetic_tokenizer()
    facts = resolve_tokens(tokenizer, load(folder).config.vocab_size, True, "</think>")
    engine = TransformersEngine(load(folder, dtype), facts, max_rows=8, device=device)
    engine.load_weights(PolicyVersion(version=2, checksum=checksum(two.items())), two.items())
    request = GroupRequest(
        group_uid="g", problem_uid="p", task="t", prompt_ids=np.arange(4, 9, dtype=np.int32),
        sample_indices=(0, 1, 2, 3), sampling=SamplingSettings(mode="latent", max_tokens=12, k=K),
        purpose="training", epoch=0, run_seed=3, verifier="v", gold_answer="",
    )  # fmt: skip
    (samples,) = collect(engine, [request]).values()
    assert {sample.policy_version_max for sample in samples} == {2}
    engine.close()


def distance(one, other):
    """L2 distance of two sets of parameters by name."""
    return float(torch.cat([(one[n].double() - other[n].double()).reshape(-1) for n in one]).norm())
