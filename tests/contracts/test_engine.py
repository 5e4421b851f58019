"""What every rollout engine holds: its samples are those of a plain loop, whatever shares the batch (METHOD §2)."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from transformers import GPT2Config, LlamaConfig, Qwen2Config, Qwen3Config
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from common.latent import gumbel_noise, sample_mixture, sample_visible, trajectory_key
from common.types import GroupRequest, PolicyVersion, SamplingSettings, TokenFacts, Trajectory
from common.weights import checksum
from rollout_workers.engine import EngineError, generate
from rollout_workers.transformers_engine import TransformersEngine

VOCAB, END, EOS = 48, 5, (1, 7, 12, 20, 33, 41)
ALLOWED = np.arange(VOCAB) < 45
FACTS = TokenFacts(vocab_size=VOCAB, allowed=ALLOWED, latent_end_id=END, eos_ids=EOS, pad_id=0)
ARCHITECTURES = ("llama", "qwen2", "qwen3", "gpt2")


def make_model(architecture: str, seed: int = 0, attention: str = "sdpa") -> torch.nn.Module:
    common = {"vocab_size": VOCAB, "max_position_embeddings": 64, "initializer_range": 0.05}
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    grouped = {**common, **sizes, "num_key_value_heads": 2}
    config = {
        "llama": lambda: LlamaConfig(**grouped),
        "qwen2": lambda: Qwen2Config(**grouped),
        "qwen3": lambda: Qwen3Config(**grouped, head_dim=16),
        "gpt2": lambda: GPT2Config(
            vocab_size=VOCAB, n_positions=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=1
        ),
    }[architecture]()
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():  # a sharper head, and sharper still where samples leave latent mode and stop
        model.get_output_embeddings().weight.mul_(4.0)
        model.get_output_embeddings().weight[[END, *EOS]] *= 2.0
    return model


def published(model: torch.nn.Module, version: int = 3) -> tuple[PolicyVersion, list[tuple[str, torch.Tensor]]]:
    tensors = [(name, p.detach().clone()) for name, p in model.named_parameters()]
    return PolicyVersion(version=version, checksum=checksum(tensors)), tensors


def make_engine(architecture: str = "llama", attention: str = "sdpa", **options: object) -> TransformersEngine:
    model = make_model(architecture, attention=attention)
    engine = TransformersEngine(model, FACTS, **options)
    engine.load_weights(*published(model))
    return engine


def make_request(
    uid: int, length: int, samples: int = 4, purpose: str = "training", **sampling: object
) -> GroupRequest:
    settings = {"mode": "latent", "max_tokens": 14, "k": 4, "temperature": 1.0} | sampling
    return GroupRequest(
        group_uid=f"g{uid}",
        problem_uid=f"p{uid}",
        task="toy",
        prompt_ids=np.random.default_rng(uid).integers(6, 40, size=length).astype(np.int32),
        sample_indices=tuple(range(samples)),
        sampling=SamplingSettings(**settings),
        purpose=purpose,
        epoch=0,
        run_seed=11,
        verifier="exact",
        gold_answer="",
    )


def collect(engine: TransformersEngine, requests: list[GroupRequest]) -> dict[str, tuple[Trajectory, ...]]:
    return {group[0].group_uid: group for group in generate(engine, requests)}


def mixed_requests() -> list[GroupRequest]:
    return [
        make_request(0, 3),
        make_request(1, 17, noise_mode="two_sided", noise_scale=0.7, top_p=0.8),
        make_request(2, 9, noise_mode="off", samples=2),
        make_request(3, 30, mode="visible", temperature=0.6, top_k=7),
        make_request(4, 5, k=2, tau=0.5, max_tokens=20, samples=3),
        make_request(5, 12, purpose="evaluation", max_tokens=3),
        make_request(6, 4, samples=4, max_tokens=40, k=3),
        make_request(7, 11, samples=4, max_tokens=40, temperature=1.5, top_p=1.0, top_k=48),
    ]


# --- the plain loop: no cache, one sample, everything recomputed at each step ------------------------------------


@torch.no_grad()
def naive(model: torch.nn.Module, request: GroupRequest, sample_index: int, version: int) -> dict[str, object]:
    s, allowed, embed = request.sampling, torch.as_tensor(ALLOWED), model.get_input_embeddings().weight
    key = trajectory_key(
        run_seed=request.run_seed,
        purpose=request.purpose,
        problem_uid=request.problem_uid,
        epoch=request.epoch,
        sample_index=sample_index,
        policy_version=0 if request.purpose == "evaluation" else version,
    )
    inputs = embed[torch.as_tensor(request.prompt_ids).long()]
    out = {"latent_ids": [], "latent_scores": [], "latent_log_probs": [], "hard_ids": [], "hard_log_probs": []}
    latent, reason = s.mode == "latent", "length"
    for step in range(s.max_tokens):
        logits = model(inputs_embeds=inputs[None]).logits[:, -1].float()
        log_p = logits.log_softmax(-1)
        gumbel = gumbel_noise(torch.tensor([key]), torch.tensor([step]), torch.arange(VOCAB)[None])
        if latent:
            top = torch.sort(log_p.masked_fill(~allowed, -torch.inf), dim=-1, descending=True, stable=True)
            if s.noise_mode == "off":
                ids, scores = top.indices[:, : s.k], top.values[:, : s.k]
            else:
                side = s.noise_mode == "one_sided"
                ids, scores, _ = sample_mixture(
                    logits, gumbel, k=s.k, top_p=s.top_p, noise_scale=s.noise_scale, tau=s.tau, one_sided=side,
                    allowed=allowed,
                )  # fmt: skip
            if END in (int(top.indices[0, 0]), int(ids[0, 0])):
                latent, token = False, END
            else:
                out["latent_ids"].append(ids[0].tolist())
                out["latent_scores"].append(scores[0].tolist())
                out["latent_log_probs"].append(log_p[0, ids[0]].tolist())
                weights = torch.softmax(scores[0] / s.tau, -1)
                inputs = torch.cat([inputs, (weights[:, None] * embed[ids[0]]).sum(0, keepdim=True)])
                continue
        else:
            drawn, _ = sample_visible(
                logits, gumbel, temperature=s.temperature, top_p=s.top_p, top_k=s.top_k, allowed=allowed
            )
            token = int(drawn[0])
            reason = "stop" if token in EOS else reason
        out["hard_ids"].append(token)
        out["hard_log_probs"].append(float((logits / s.temperature).log_softmax(-1)[0, token]))
        if reason == "stop":
            break
        inputs = torch.cat([inputs, embed[token][None]])
    return out | {"finish_reason": reason}


def assert_same(sample: Trajectory, expected: Trajectory | dict[str, object], tolerance: float = 1e-4) -> None:
    want = expected if isinstance(expected, dict) else dataclasses_dict(expected)
    assert sample.finish_reason == want["finish_reason"]
    assert sample.latent_ids.tolist() == np.asarray(want["latent_ids"]).tolist()
    assert sample.hard_ids.tolist() == np.asarray(want["hard_ids"]).tolist()
    for name in ("latent_scores", "latent_log_probs", "hard_log_probs"):
        np.testing.assert_allclose(
            getattr(sample, name).ravel(), np.ravel(want[name]), rtol=0, atol=tolerance, err_msg=name
        )


def dataclasses_dict(sample: Trajectory) -> dict[str, object]:
    return {f.name: getattr(sample, f.name) for f in dataclasses.fields(sample)}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_samples_equal_the_plain_loop(architecture: str) -> None:
    engine, requests = make_engine(architecture), mixed_requests()
    groups, model = collect(engine, requests), make_model(architecture)
    reasons = set()
    for request in requests:
        for index, sample in zip(request.sample_indices, groups[request.group_uid], strict=True):
            assert sample.sample_index == index
            assert_same(sample, naive(model, request, index, version=3))
            reasons.add((sample.finish_reason, len(sample.latent_ids) > 0, len(sample.hard_ids) > 0))
    assert ("stop", True, True) in reasons, f"no sample went from latent mode to EOS: {reasons}"
    assert ("length", True, False) in reasons, f"no sample used its budget up in latent mode: {reasons}"
    assert engine.pending == 0


def test_eager_attention_gives_the_same_samples() -> None:
    reference, eager = (
        collect(make_engine(), mixed_requests()),
        collect(make_engine(attention="eager"), mixed_requests()),
    )
    for uid, group in reference.items():
        for a, b in zip(group, eager[uid], strict=True):
            assert_same(a, b)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("max_rows", [4, 7, 64])
def test_company_and_queueing_do_not_change_a_sample(architecture: str, max_rows: int) -> None:
    requests = mixed_requests()
    together = collect(make_engine(architecture, max_rows=max_rows), requests)
    for request in requests:
        alone = collect(make_engine(architecture), [request])[request.group_uid]
        for a, b in zip(together[request.group_uid], alone, strict=True):
            assert_same(a, b)


def test_groups_join_while_others_run() -> None:
    engine, requests, found = make_engine(), mixed_requests(), {}
    for request in requests:
        engine.add(request)
        for _ in range(2):
            found |= {g[0].group_uid: g for g in engine.step()}
    while engine.pending:
        found |= {g[0].group_uid: g for g in engine.step()}
    for uid, group in collect(make_engine(), requests).items():
        for a, b in zip(found[uid], group, strict=True):
            assert_same(a, b)


def test_deterministic_engine_is_bit_equal_in_any_company() -> None:
    requests = mixed_requests()
    forward = collect(make_engine(deterministic=True), requests)
    backward = collect(make_engine(deterministic=True), requests[::-1])
    for uid, group in forward.items():
        for a, b in zip(group, backward[uid], strict=True):
            assert_same(a, b, tolerance=0.0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_visible_equals_generate(architecture: str) -> None:
    model = make_model(architecture)
    facts = dataclasses.replace(FACTS, allowed=np.ones(VOCAB, dtype=bool))
    engine = TransformersEngine(model, facts)
    engine.load_weights(*published(model))
    for length in (4, 19):
        request = make_request(length, length, samples=1, mode="visible", top_k=1)
        sample = collect(engine, [request])[request.group_uid][0]
        prompt = torch.as_tensor(request.prompt_ids).long()[None]
        reference = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=14,
            eos_token_id=list(EOS),
            pad_token_id=0,
        )
        assert sample.hard_ids.tolist() == reference[0, length:].tolist()


def test_evaluation_draws_do_not_depend_on_the_version() -> None:
    model = make_model("llama")
    engine = TransformersEngine(model, FACTS)
    drawn = {}
    for purpose in ("training", "evaluation"):
        for version in (3, 4):
            engine.load_weights(*published(model, version))
            request = make_request(0, 8, purpose=purpose)
            group = collect(engine, [request])["g0"]
            drawn[purpose, version] = [(t.latent_scores.tolist(), t.hard_ids.tolist()) for t in group]
            assert {t.policy_version_min for t in group} == {t.policy_version_max for t in group} == {version}
    assert drawn["evaluation", 3] == drawn["evaluation", 4]
    assert drawn["training", 3] != drawn["training", 4]


def test_ids_that_the_tokenizer_lacks_are_never_drawn() -> None:
    for group in collect(make_engine(), mixed_requests()).values():
        for sample in group:
            assert ALLOWED[sample.latent_ids].all()
            assert ALLOWED[sample.hard_ids].all()
            assert np.isfinite(sample.latent_scores).all()


# --- refusals and weights ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (make_request(0, 60, max_tokens=5), "max_position_embeddings"),
        (make_request(0, 3, k=46), "allowed ids"),
        (make_request(0, 3, samples=9), "max_rows=8"),
        (make_request(0, 0), "prompt ids"),
        (make_request(0, 3, temperature=0.0), "temperature > 0"),
    ],
)
def test_what_cannot_be_served_is_refused_and_nothing_queued(request_: GroupRequest, message: str) -> None:
    engine = make_engine(max_rows=8)
    with pytest.raises(EngineError, match=message):
        engine.add(request_)
    assert engine.pending == 0
    assert engine.step() == []


def test_latent_mode_needs_an_end_token() -> None:
    model = make_model("llama")
    engine = TransformersEngine(model, dataclasses.replace(FACTS, latent_end_id=None))
    engine.load_weights(*published(model))
    with pytest.raises(EngineError, match="latent-end token"):
        engine.add(make_request(0, 3))
    assert len(collect(engine, [make_request(0, 3, mode="visible")])) == 1


def test_an_engine_without_verified_weights_refuses() -> None:
    model = make_model("qwen2")
    engine = TransformersEngine(model, FACTS)
    with pytest.raises(EngineError, match="load_weights"):
        engine.add(make_request(0, 3))
    version, tensors = published(make_model("qwen2", seed=1))
    corrupt = [(n, t + 1e-3 if i == 2 else t) for i, (n, t) in enumerate(tensors)]
    renamed = [("no.such.weight", tensors[0][1]), *tensors[1:]]
    reshaped = [(tensors[0][0], tensors[0][1][:-1]), *tensors[1:]]
    for damaged in (corrupt, tensors[:-1], renamed, reshaped):
        engine.load_weights(version, tensors)
        assert engine.version == version
        with pytest.raises(EngineError):
            engine.load_weights(version, damaged)
        assert engine.version is None
        with pytest.raises(EngineError, match="load_weights"):
            engine.add(make_request(0, 3))


def test_new_weights_change_the_samples_and_never_mid_sample() -> None:
    engine, request = make_engine(), make_request(0, 6)
    before = collect(engine, [request])["g0"]
    engine.add(request)
    engine.step()
    other = published(make_model("llama", seed=1), version=3)
    with pytest.raises(EngineError, match="pending"):
        engine.load_weights(*other)
    while engine.pending:
        for group in engine.step():
            for a, b in zip(group, before, strict=True):
                assert_same(a, b)
    engine.load_weights(*other)
    after = collect(engine, [request])["g0"]
    assert [t.latent_scores.tolist() for t in after] != [t.latent_scores.tolist() for t in before]


def test_abort_forgets_and_close_is_idempotent() -> None:
    engine = make_engine(max_rows=6)
    expected = collect(engine, [make_request(0, 6)])["g0"]
    for uid in range(3):
        engine.add(make_request(uid, 6))
    engine.step()
    assert engine.pending == 12
    engine.abort()
    assert engine.pending == 0
    for a, b in zip(collect(engine, [make_request(0, 6)])["g0"], expected, strict=True):
        assert_same(a, b)
    engine.close()
    engine.close()
    with pytest.raises(EngineError, match="load_weights"):
        engine.add(make_request(0, 3))
