"""What every rollout engine holds: its samples are those of a plain loop, whatever shares the batch (METHOD §2)."""

from __future__ import annotations

import copy
import dataclasses
import functools
import os
import tempfile
import warnings

import numpy as np
import pytest
import torch
from engine_driving import Check, collect, collect_pending, published, weights_in_flight
from redraw import Redraw, redraw
from step_recorder import StepRecorder
from transformers import GPT2Config, LlamaConfig, Qwen2Config, Qwen3Config
from transformers.models.auto.modeling_auto import AutoModelForCausalLM
from waiting import WAITING, Without

from latent_grpo.common.latent import sample_mixture, sample_visible
from latent_grpo.common.models import extend_positions
from latent_grpo.common.noise import gumbel_noise, noise_version, trajectory_key
from latent_grpo.common.types import GroupRequest, SamplingSettings, TokenFacts, Trajectory
from latent_grpo.rollout_workers import decoding
from latent_grpo.rollout_workers.engine import EngineError, LatentEngine
from latent_grpo.rollout_workers.transformers_engine import TransformersEngine

VOCAB, END, EOS = 48, 5, (1, 7, 12, 20, 33, 41)
ALLOWED = np.arange(VOCAB) < 45
FACTS = TokenFacts(vocab_size=VOCAB, allowed=ALLOWED, latent_end_id=END, eos_ids=EOS, pad_id=0)
ARCHITECTURES = ("llama", "qwen2", "qwen3", "gpt2")
VLLM = pytest.mark.vllm
EMBEDDED = ("transformers", "run_ahead", "graphs")  # as on a CPU; two ways for CUDA: see `embedded`
KINDS = (*EMBEDDED, pytest.param("vllm", marks=VLLM))
CASES = [("run_ahead", "llama"), ("graphs", "llama"), ("graphs", "gpt2")] + [
    pytest.param("vllm", a, marks=VLLM) for a in ("llama", "qwen2", "qwen3", "llama-tied")
]
NEAR = 1e-4  # scores closer than this may change places between engines: their sums have another order
CHAINED = 1e-3  # between samples of two engines: each step's rounding goes into the mixture that the next one reads
started: list[LatentEngine] = []  # vLLM engines; conftest.py ends them after each test


def make_model(architecture: str, seed: int = 0, attention: str = "sdpa", positions: int = 64) -> torch.nn.Module:
    common = {"vocab_size": VOCAB, "max_position_embeddings": positions, "initializer_range": 0.05}
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    grouped = {**common, **sizes, "num_key_value_heads": 1}
    config = {
        "llama": lambda: LlamaConfig(**grouped),
        "llama-tied": lambda: LlamaConfig(**grouped, tie_word_embeddings=True),
        "qwen2": lambda: Qwen2Config(**grouped),
        "qwen3": lambda: Qwen3Config(**grouped, head_dim=32),
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


def embedded(kind: str) -> dict[str, object]:
    """The options of an engine that looks at what ended in the step before, and of one that repeats recorded steps."""
    return {"capture": StepRecorder()} if kind == "graphs" else {"run_ahead": kind == "run_ahead"}


def bare_engine(kind: str, architecture: str = "llama", facts: TokenFacts = FACTS, **options: object) -> LatentEngine:
    """An engine without a version."""
    if kind in EMBEDDED:
        model = make_model(architecture)
        extend_positions(model.config, options.pop("max_positions", None))
        return TransformersEngine(model, facts, **embedded(kind), **options)
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    from latent_grpo.common.config import VLLMConfig
    from latent_grpo.rollout_workers.vllm_engine import VLLMEngine

    settings = VLLMConfig(**{"kv_cache_bytes": 2**24, "batched_tokens": 64, **options.pop("vllm", {})})
    folder = model_folder(architecture, options.pop("positions", 64))
    engine = VLLMEngine(folder, facts, options=settings, **{"max_rows": 64, **options})
    started.append(engine)
    return engine


@functools.cache
def model_folder(architecture: str, positions: int) -> str:
    folder = tempfile.mkdtemp(prefix="lgm-")
    make_model(architecture, positions=positions).save_pretrained(folder)
    return folder


def make_engine(architecture: str = "llama", kind: str = "transformers", **options: object) -> LatentEngine:
    engine = bare_engine(kind, architecture, **options)
    engine.load_weights(*published(make_model(architecture)))
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


def mixed_requests() -> list[GroupRequest]:
    return [
        make_request(0, 3),
        make_request(1, 17, noise_mode="two_sided", noise_scale=0.7, top_p=0.8),
        make_request(2, 9, noise_mode="off", samples=2),
        make_request(3, 30, mode="visible", temperature=0.6, top_k=7),
        make_request(4, 5, k=2, tau=0.5, max_tokens=20, samples=3),
        make_request(5, 12, purpose="evaluation", max_tokens=3),
        make_request(6, 4, samples=4, max_tokens=40, k=3),
        make_request(9, 8, samples=4, max_tokens=40, k=3, latent_exit="first"),
        make_request(7, 11, samples=4, max_tokens=40, temperature=1.5, top_p=1.0, top_k=48),
        make_request(8, 6, samples=2, mode="visible", max_tokens=1),
        make_request(10, 7, samples=2, mode="visible", temperature=0.6, top_k=0),
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
        policy_version=noise_version(request.purpose, version),
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
            exits = [int(ids[0, 0])] + ([int(top.indices[0, 0])] if s.latent_exit == "argmax_or_first" else [])
            if END in exits:
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


def assert_redrawn(
    model: torch.nn.Module, request: GroupRequest, sample: Trajectory, version: int = 3, first: int = 0
) -> Redraw:
    """A record's steps from `first` on are those that the samplers draw on its own history."""
    found = redraw(model, request, sample, FACTS, version=version, tolerance=NEAR, first=first)
    assert max(found.latent_gaps + found.hard_gaps) < NEAR
    return found


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"sample_index": 11}, "candidate|out of order|record's key"),
        ({"latent_ids": lambda ids: ids[:, ::-1]}, "candidate|out of order"),
        ({"latent_ids": lambda ids: np.where(np.arange(4) == 3, 0, ids)}, "candidate|out of order"),
        ({"latent_log_probs": lambda log_p: log_p + 0.01}, "from that of the record's key"),
        ({"hard_ids": lambda ids: np.append(ids[:-1], 40)}, "another token|EOS ends"),
        ({"finish_reason": "length"}, "EOS ends"),
    ],
)
def test_a_damaged_record_is_not_redrawn(damage, message):
    engine, request = make_engine(), make_request(8, 4, samples=8, max_tokens=40, top_k=48)
    samples = [t for t in collect(engine, [request])["g8"] if t.finish_reason == "stop" and len(t.latent_ids) > 2]
    assert len(samples) > 4
    for sample in samples:
        assert assert_redrawn(make_model("llama"), request, sample).alike == sample.num_steps
        changes = {n: v(getattr(sample, n)).copy() if callable(v) else v for n, v in damage.items()}
        with pytest.raises(AssertionError, match=message):
            assert_redrawn(make_model("llama"), request, dataclasses.replace(sample, **changes))


@pytest.mark.parametrize(
    ("kind", "architecture"),
    [*zip(("transformers",) * 4, ARCHITECTURES), ("run_ahead", "gpt2"), ("graphs", "qwen3")],
)
def test_samples_equal_the_plain_loop(kind: str, architecture: str) -> None:
    engine, requests = make_engine(architecture, kind), mixed_requests()
    groups, model = collect(engine, requests), make_model(architecture)
    for request in requests:
        for index, sample in zip(request.sample_indices, groups[request.group_uid], strict=True):
            assert sample.sample_index == index
            assert_same(sample, naive(model, request, index, version=3))
    assert_every_end(groups)
    assert engine.pending == 0


def assert_every_end(groups: dict[str, tuple[Trajectory, ...]]) -> None:
    ends = {(t.finish_reason, t.sampling.mode, len(t.hard_ids) > 0) for group in groups.values() for t in group}
    assert ("stop", "latent", True) in ends, f"no sample went from latent mode to EOS: {ends}"
    assert ("length", "latent", False) in ends, f"no sample used its budget up in latent mode: {ends}"
    assert ("length", "visible", True) in ends, f"no sample used its budget up in visible mode: {ends}"
    assert ("stop", "visible", True) in ends, f"no visible sample stopped: {ends}"


@pytest.mark.parametrize(
    ("kind", "options"),
    [("transformers", {"max_rows": 7}), ("transformers", {"deterministic": True}), ("run_ahead", {"max_rows": 7})],
    ids=str,
)
def test_without_noise_a_group_takes_its_latent_steps_once(kind: str, options: dict[str, object]) -> None:
    """GPT-2 is decoded by its own forward pass, in which the rows of each step can be counted."""
    requests = [make_request(uid, 5 + uid, samples=5, noise_mode="off", max_tokens=25) for uid in range(5)]
    requests.append(make_request(9, 4, samples=2, max_tokens=9))
    engine, model = make_engine("gpt2", kind, **options), make_model("gpt2")
    rows: list[int] = []
    running = engine._model.base_model  # private: the module whose passes are counted
    running.register_forward_hook(lambda module, arguments, output: rows.append(len(output.last_hidden_state)))
    groups = collect(engine, requests)
    for request in requests:
        for index, sample in zip(request.sample_indices, groups[request.group_uid], strict=True):
            assert_same(sample, naive(model, request, index, version=3))
    *alike, noisy = (groups[request.group_uid] for request in requests)
    together = [min(len(group[0].latent_ids) + 1, 25) for group in alike]  # steps up to the end of latent mode
    assert len(set(together)) > 2, "the groups leave latent mode at different steps"
    assert 25 in together, "and one never does"
    passes = len(requests)  # each prompt's own pass gives the first step of all its samples
    passes += sum(shared - 1 + sum(t.num_steps - shared for t in group) for shared, group in zip(together, alike))
    passes += sum(t.num_steps - 1 for t in noisy)
    if kind == "run_ahead":  # a step too many of each row at its end
        passes += sum(1 if shared == 25 else len(group) for shared, group in zip(together, alike)) + len(noisy)
    assert sum(rows) == passes
    assert engine.pending == 0


@pytest.mark.parametrize(("kind", "architecture"), CASES)
def test_every_engine_records_what_the_transformers_engine_does(kind: str, architecture: str) -> None:
    engine, requests, model = make_engine(architecture, kind), mixed_requests(), make_model(architecture)
    groups, reference = collect(engine, requests), collect(make_engine(architecture), requests)
    for request in requests:
        for sample, same in zip(groups[request.group_uid], reference[request.group_uid], strict=True):
            assert (sample.sample_index, sample.engine) == (same.sample_index, engine.name)
            again = assert_redrawn(model, request, sample)
            if again.alike < again.steps:  # from a near-tie on it is another sample, compared on its own history
                warnings.warn(f"{architecture} {request.group_uid} #{sample.sample_index}: {again}", stacklevel=1)
            else:
                assert_same(sample, same, tolerance=CHAINED)
    if architecture != "llama-tied":  # a random tied model repeats its input
        assert_every_end(groups)
    assert engine.pending == 0


def test_a_step_that_runs_ahead_waits_for_nothing() -> None:
    """Prompts aside, whose pass is Transformers' own: mixed settings, leaving latent mode, rows that end."""
    engine = make_engine(kind="run_ahead")
    for request in mixed_requests():
        engine.add(request)
    engine.step()
    with Without(WAITING - {"numpy"}):  # of values that a step before has sent
        while engine.pending:
            engine.step()


@pytest.mark.parametrize("lean", [True, False], ids=["lean", "Transformers' own"])
def test_steps_are_recorded_once_and_then_repeated(lean: bool) -> None:
    recorder = StepRecorder()
    engine = TransformersEngine(make_model("llama"), FACTS, capture=recorder)
    if not lean:
        engine._forward._lean = None  # as on CUDA, where no public way leads to a CPU's tests
    engine.load_weights(*published(make_model("llama")))
    for _ in range(2):  # the second time everything is known
        before = recorder.captured, recorder.replayed
        found = collect(engine, [make_request(0, 5, max_tokens=40), make_request(1, 9, max_tokens=40)])
    assert recorder.captured == before[0] <= 4, "two row counts; with rows in latent mode and without"
    assert recorder.replayed - before[1] >= max(t.num_steps for g in found.values() for t in g) - 1
    again = collect(make_engine(), [make_request(0, 5, max_tokens=40), make_request(1, 9, max_tokens=40)])
    for uid, group in found.items():
        for a, b in zip(again[uid], group, strict=True):
            assert_same(a, b)


@pytest.mark.parametrize("kind", ["run_ahead", "graphs"])
def test_what_was_drawn_from_too_few_ids_is_decoded_again(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, step = [], decoding.latent_step
    monkeypatch.setattr(decoding, "latent_step", lambda *a, **s: asked.append(s["widen"]) or step(*a, **s, top_m=8))
    groups = collect(make_engine(kind=kind), mixed_requests())
    assert True in asked, "nothing was drawn again"
    assert False in asked, "everything waits"
    for uid, group in collect(make_engine(), mixed_requests()).items():
        for a, b in zip(groups[uid], group, strict=True):
            assert_same(a, b)


def test_eager_attention_gives_the_same_samples() -> None:
    reference, model = collect(make_engine(), mixed_requests()), make_model("llama", attention="eager")
    eager = TransformersEngine(model, FACTS)
    eager.load_weights(*published(model))
    for uid, group in collect(eager, mixed_requests()).items():
        for a, b in zip(reference[uid], group, strict=True):
            assert_same(a, b)


@pytest.mark.parametrize(
    ("kind", "architecture", "max_rows"),
    [("transformers", a, rows) for a in ("llama", "gpt2") for rows in (4, 7, 64)]
    + [
        ("run_ahead", "llama", 7),
        ("graphs", "llama", 7),
        ("graphs", "gpt2", 20),
        pytest.param("vllm", "llama", 5, marks=VLLM),
    ],
)
def test_company_and_queueing_do_not_change_a_sample(kind: str, architecture: str, max_rows: int) -> None:
    requests = mixed_requests()
    together = collect(make_engine(architecture, kind, max_rows=max_rows), requests)
    single = make_engine(architecture, kind)
    for request in requests:
        alone = collect(single, [request])[request.group_uid]
        for a, b in zip(together[request.group_uid], alone, strict=True):
            assert_same(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_groups_join_while_others_run(kind: str) -> None:
    engine, requests, found = make_engine(kind=kind), mixed_requests(), {}
    for request in requests:
        engine.add(request)
        for _ in range(2):
            found |= {g[0].group_uid: g for g in engine.step()}
    while engine.pending:
        found |= {g[0].group_uid: g for g in engine.step()}
    for uid, group in collect(make_engine(), requests).items():
        for a, b in zip(found[uid], group, strict=True):
            assert_same(a, b)


@pytest.mark.parametrize("kind", EMBEDDED)
def test_deterministic_engine_is_bit_equal_in_any_company(kind: str) -> None:
    requests = mixed_requests()
    forward = collect(make_engine(kind=kind, deterministic=True), requests)
    backward = collect(make_engine(kind=kind, deterministic=True), requests[::-1])
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


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_draws_do_not_depend_on_the_version(kind: str) -> None:
    model = make_model("llama")
    engine = bare_engine(kind)
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


@pytest.mark.parametrize("kind", KINDS)
def test_ids_that_the_tokenizer_lacks_are_never_drawn(kind: str) -> None:
    for group in collect(make_engine(kind=kind), mixed_requests()).values():
        for sample in group:
            assert ALLOWED[sample.latent_ids].all()
            assert ALLOWED[sample.hard_ids].all()
            assert np.isfinite(sample.latent_scores).all()


@pytest.mark.parametrize("kind", KINDS)
def test_positions_beyond_the_checkpoints_are_served_where_the_run_says_so(kind: str) -> None:
    """`model.max_positions`: rotary positions extrapolate, and every step is what the model itself computes there."""
    engine, model, request = make_engine(kind=kind, max_positions=96), make_model("llama"), make_request(0, 58)
    request = dataclasses.replace(request, sampling=dataclasses.replace(request.sampling, max_tokens=30))
    (group,) = collect(engine, [request]).values()
    assert max(sample.num_steps for sample in group) > 64 - 58, "no sample passes the checkpoint's 64 positions"
    for sample in group:
        assert_redrawn(model, request, sample)
    with pytest.raises(EngineError, match="max_position_embeddings"):
        engine.add(make_request(1, 90, max_tokens=7))


# --- refusals and weights ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_be_served_is_refused_and_nothing_queued(kind: str) -> None:
    engine = make_engine(kind=kind, max_rows=8)
    for request, message in (
        (make_request(0, 60, max_tokens=5), "max_position_embeddings"),
        (make_request(0, 3, k=46), "allowed ids"),
        (make_request(0, 3, samples=9), "max_rows=8"),
        (make_request(0, 0), "prompt ids"),
        (make_request(0, 3, temperature=0.0), "temperature > 0"),
    ):
        with pytest.raises(EngineError, match=message):
            engine.add(request)
        assert engine.pending == 0
        assert engine.step() == []


@pytest.mark.parametrize("kind", KINDS)
def test_latent_mode_needs_an_end_token(kind: str) -> None:
    engine = make_engine(kind=kind, facts=dataclasses.replace(FACTS, latent_end_id=None))
    with pytest.raises(EngineError, match="latent-end token"):
        engine.add(make_request(0, 3))
    assert len(collect(engine, [make_request(0, 3, mode="visible")])) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_an_engine_without_verified_weights_refuses(kind: str) -> None:
    engine = bare_engine(kind, "qwen2")
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


@pytest.mark.parametrize("kind", KINDS)
def test_new_weights_change_the_samples_and_never_mid_sample(kind: str) -> None:
    engine, request = make_engine(kind=kind), make_request(0, 6)
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


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ["llama", "llama-tied"])
def test_weights_of_which_some_are_unchanged_give_the_samples_of_all(kind: str, architecture: str) -> None:
    engine, request = make_engine(architecture, kind), make_request(0, 6)
    model = make_model(architecture)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layers.1.self_attn.q_proj" in name or name.endswith("norm.weight"):
                parameter.mul_(1.5)
    version, tensors = published(model, version=4)
    first = dict(make_model(architecture).named_parameters())
    engine.load_weights(version, tensors, [name for name, tensor in tensors if torch.equal(tensor, first[name])])
    assert engine.version == version
    fresh = bare_engine(kind, architecture)
    fresh.load_weights(version, tensors)
    for sample, same in zip(collect(engine, [request])["g0"], collect(fresh, [request])["g0"], strict=True):
        assert_same(sample, same)
    with pytest.raises(EngineError):  # what is said to be unchanged counts by what it was
        engine.load_weights(*published(make_model(architecture, seed=1)), unchanged=[tensors[0][0]])


@pytest.mark.parametrize("kind", KINDS)
def test_weights_in_flight_recompute_what_running_samples_have(kind: str) -> None:
    def start(model: torch.nn.Module, version: int = 3, **options: object) -> LatentEngine:
        if kind in EMBEDDED:
            engine: LatentEngine = TransformersEngine(copy.deepcopy(model), FACTS, **embedded(kind), **options)
        else:
            blocks = {"engine_args": {"block_size": 32}}  # so that samples share a prompt, and all begin at once
            engine = bare_engine(kind, positions=256, max_length=160, vllm=blocks, **options)
        engine.load_weights(*published(model, version))
        return engine

    old, new = (make_model("llama", seed=seed, positions=256) for seed in (0, 1))
    # hardly ever leaves latent mode in 80 steps: an end token is unlikely under little noise
    requests = [make_request(0, 40, samples=3, max_tokens=80, k=3, noise_scale=0.5)]
    assert weights_in_flight(start, old, new, requests, Check(FACTS, tolerance=NEAR, gap=NEAR)).steps > 20


@pytest.mark.parametrize("steps", [1, 6, 12])
@pytest.mark.parametrize("max_rows", [9, 64])
@pytest.mark.parametrize(
    ("kind", "architecture"),
    [("transformers", "llama"), ("transformers", "gpt2"), ("run_ahead", "llama"), ("graphs", "llama")],
)
def test_the_same_weights_in_flight_change_no_sample(kind: str, architecture: str, max_rows: int, steps: int) -> None:
    """Whatever a row's mode, length and place are, and although others have ended: its past is computed as it was."""
    engine, found = make_engine(architecture, kind, max_rows=max_rows, in_flight_updates=True), {}
    for request in mixed_requests():
        engine.add(request)
    for _ in range(steps):
        found |= {group[0].group_uid: group for group in engine.step()}
    engine.load_weights(*published(make_model(architecture)))
    found |= collect_pending(engine)
    for uid, group in collect(make_engine(architecture), mixed_requests()).items():
        for a, b in zip(found[uid], group, strict=True):
            assert_same(a, b)


@pytest.mark.parametrize("kind", EMBEDDED)
def test_weights_that_fail_in_flight_stop_the_samples_until_others_are_whole(kind: str) -> None:
    engine, request = make_engine(kind=kind, in_flight_updates=True), make_request(6, 4, max_tokens=40, k=3)
    undisturbed = collect(engine, [request])["g6"]
    engine.add(request)
    for _ in range(3):
        engine.step()
    version, tensors = published(make_model("llama", seed=1), version=4)
    with pytest.raises(EngineError, match="checksum"):
        engine.load_weights(version, [(name, tensor + 1e-3) for name, tensor in tensors])
    with pytest.raises(EngineError, match=r"4 samples are pending; abort the pending samples and load_weights again"):
        engine.step()
    engine.load_weights(*published(make_model("llama")))
    for a, b in zip(collect_pending(engine)["g6"], undisturbed, strict=True):
        assert_same(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_a_running_sample_shows_the_beginning_of_its_record(kind: str) -> None:
    engine = make_engine(kind=kind, **({"streaming": True} if kind == "vllm" else {}))
    requests = [make_request(6, 4, max_tokens=30, k=3), make_request(3, 9, mode="visible", temperature=3.0)]
    longest = {
        uid: max(group, key=lambda t: t.num_steps).sample_index for uid, group in collect(engine, requests).items()
    }
    for request in requests:
        engine.add(request)
    seen: dict[str, list] = {uid: [] for uid in longest}
    found = {}
    while engine.pending:
        found |= {group[0].group_uid: group for group in engine.step()}
        for uid, records in seen.items():
            record = engine.partial(uid, longest[uid])
            assert (record is None) or uid not in found
            records += [] if record is None else [record]
    for uid, records in seen.items():
        whole = found[uid][longest[uid]]
        assert records, "it was never seen running"
        lengths = [len(r.latent_ids) + len(r.hard_ids) for r in records]
        assert lengths == sorted(lengths)
        assert 1 <= lengths[0] <= lengths[-1] < whole.num_steps
        for record in records:
            for name in ("latent_ids", "latent_scores", "hard_ids", "hard_log_probs"):
                part = getattr(record, name)
                assert np.array_equal(part, getattr(whole, name)[: len(part)])
    assert len(seen["g6"]) > 2
    assert engine.partial("g6", longest["g6"]) is None
    assert engine.partial("unknown", 0) is None


@pytest.mark.parametrize("kind", KINDS)
def test_abort_forgets_and_close_is_idempotent(kind: str) -> None:
    engine = make_engine(kind=kind, max_rows=6)
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
