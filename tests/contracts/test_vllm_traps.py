"""What goes wrong when latent steps meet a serving engine, each with its remedy: these fail without it."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import numpy as np
import pytest
from engine_driving import (
    Check,
    collect,
    collect_pending,
    core_of,
    crowded_out,
    other_weights_equal_a_fresh_start,
    published,
    scheduler_of,
    worker_of,
)
from test_engine import (
    EOS,
    FACTS,
    NEAR,
    assert_same,
    bare_engine,
    make_engine,
    make_model,
    make_request,
    mixed_requests,
)

from latent_grpo.rollout_workers import decoding, vllm_engine
from latent_grpo.rollout_workers.engine import EngineError
from latent_grpo.rollout_workers.vllm_plugin.settings import KEY

pytestmark = pytest.mark.vllm


def long_model():
    """More positions than the contract's model, so that whole KV blocks lie behind the prompts."""
    return make_model("llama", positions=256)


def long_engine(model=None, version=3, in_flight_updates=False, **vllm):
    engine_args = {"block_size": 32, **vllm.pop("engine_args", {})}
    engine = bare_engine(
        "vllm", "llama", positions=256, max_length=160, max_rows=vllm.pop("max_rows", 64),
        in_flight_updates=in_flight_updates,
        vllm={"engine_args": engine_args, **vllm},
    )  # fmt: skip
    engine.load_weights(*published(model or long_model(), version))
    return engine


def long_requests(groups=3, samples=3, length=40):
    """Responses of 80 steps that hardly ever leave latent mode: an end token is unlikely under little noise."""
    return [
        make_request(uid, length + uid, samples=samples, max_tokens=80, k=3, noise_scale=0.5) for uid in range(groups)
    ]


CHECK = Check(FACTS, tolerance=NEAR, gap=NEAR)


def test_a_prompt_is_computed_once_for_its_group(monkeypatch):
    engine, requests = long_engine(), long_requests(groups=1)
    manager = scheduler_of(engine).kv_cache_manager
    found, original = [], manager.get_computed_blocks

    def seen(request, *args, **kwargs):
        found.append(original(request, *args, **kwargs))
        return found[-1]

    monkeypatch.setattr(manager, "get_computed_blocks", seen)
    CHECK.redrawn(long_model(), requests, collect(engine, requests))
    assert [computed for _, computed, *_ in found] == [0, 32, 32], "of 40 tokens one block of 32 can be shared"


CROWDED = {"kv_cache_bytes": 14 * 2 * 2 * 32 * 32 * 4}  # 14 blocks of 32 positions, where eight samples want 25


@pytest.mark.parametrize("caching", [True, False])
def test_preempted_samples_go_on_with_their_mixtures(caching):
    engine = long_engine(**CROWDED, engine_args={"enable_prefix_caching": caching})
    requests = long_requests(groups=1, samples=8)
    found = crowded_out(engine, long_model(), requests, CHECK, generated=23)  # behind a whole block
    assert len(found.latent_gaps) > 600


def test_histories_without_a_name_of_their_own_would_be_mixed_up(monkeypatch):
    """The remedy taken away: a preempted sample finds the keys and values of another one's mixtures."""
    monkeypatch.setattr(vllm_engine, "keep_histories_apart", lambda hasher, block_size: hasher)
    engine, requests = long_engine(**CROWDED), long_requests(groups=1, samples=8)
    groups = collect(engine, requests)
    with pytest.raises(AssertionError):
        CHECK.redrawn(long_model(), requests, groups)


def test_long_prompts_are_prefilled_in_chunks_beside_running_samples():
    engine = long_engine(batched_tokens=16, max_rows=8, engine_args={"enable_prefix_caching": False})
    requests = [make_request(uid, 12 + 20 * uid, samples=2, max_tokens=30, k=3) for uid in range(4)]
    groups = collect(engine, requests)
    CHECK.redrawn(long_model(), requests, groups)


def test_a_stop_id_as_proxy_of_a_mixture_does_not_end_the_sample():
    engine, requests = make_engine(kind="vllm"), mixed_requests()
    proxies = [t.latent_ids[:, 0] for group in collect(engine, requests).values() for t in group if len(t.latent_ids)]
    inside = sum(int(np.isin(p[:-1], EOS).sum()) for p in proxies)
    assert inside > 0, "no proxy was a stop id, so the test shows nothing"


def test_more_samples_than_rows_wait_and_every_state_is_freed():
    engine = make_engine(kind="vllm", max_rows=4)
    groups = collect(engine, mixed_requests())
    assert len(groups) == len(mixed_requests())
    assert not core_of(engine).slots
    for request in mixed_requests():
        engine.add(request)
    for _ in range(3):
        engine.step()
    assert core_of(engine).slots
    engine.abort()
    assert not core_of(engine).slots
    reference = collect(make_engine(), mixed_requests())
    for uid, group in collect(engine, mixed_requests()).items():
        for a, b in zip(group, reference[uid], strict=True):
            assert_same(a, b)
    assert not core_of(engine).slots


def test_records_have_their_place_before_vllm_measures_its_memory():
    engine = bare_engine("vllm", max_rows=8, max_tokens=14, k=4)
    expected = 9 * 14 * 4 * 12  # rows and one more, steps, components, bytes of an id, a score and a log-prob
    assert core_of(engine).record_bytes == expected
    engine.load_weights(*published(make_model("llama")))
    collect(engine, [make_request(uid, 5) for uid in range(4)])
    assert core_of(engine).record_bytes == expected


def test_samples_of_a_group_are_drawn_each_with_its_own_key():
    engine = make_engine(kind="vllm")
    (group,) = collect(engine, [make_request(0, 9, samples=6)]).values()
    assert len({t.latent_scores.tobytes() for t in group}) == 6
    with watched(engine) as params:
        engine.add(make_request(0, 9, samples=6))
    engine.abort()
    assert len({p.extra_args[KEY]["key"] for p in params}) == 6


@contextlib.contextmanager
def watched(engine):
    """The parameters of every request to vLLM while this lasts."""
    llm = engine._llm  # what vLLM is asked for is the subject
    seen, original = [], llm.add_request
    llm.add_request = lambda uid, prompt, params: seen.append(params) or original(uid, prompt, params)
    yield seen
    llm.add_request = original


def other_model():
    return make_model("llama", seed=1, positions=256)


def test_after_new_weights_a_known_prompt_is_computed_again():
    requests = long_requests(groups=1)
    assert other_weights_equal_a_fresh_start(long_engine, long_model(), other_model(), requests, CHECK).steps > 60


def test_rows_of_every_noise_mode_share_a_batch():
    """Same k and same top_p, so that they share the draw too."""
    requests = [
        make_request(uid, 9 + uid, samples=3, max_tokens=30, k=3, noise_mode=mode)
        for uid, mode in enumerate(("one_sided", "off", "two_sided"))
    ]
    found = CHECK.redrawn(make_model("llama"), requests, collect(make_engine(kind="vllm"), requests))
    assert found.alike == found.steps > 100


class Lost(RuntimeError):
    """A publication whose second half does not arrive."""


def lost_midway(load, arrive):
    """A model's `load_weights` that stops in the middle of `arrive` tensors."""

    def load_weights(tensors):
        def some():
            for number, tensor in enumerate(tensors):
                if number == arrive:
                    raise Lost("the connection is gone")
                yield tensor

        return load(some())

    return load_weights


@pytest.mark.parametrize("arrive", [3, 5])  # embedding, q and k without v of a fused layer; or all of it
def test_a_load_that_fails_in_flight_stops_the_samples_until_weights_are_whole_again(monkeypatch, arrive):
    engine, request = long_engine(in_flight_updates=True), long_requests(groups=1)[0]
    undisturbed = collect(engine, [request])["g0"]
    engine.add(request)
    for _ in range(20):
        engine.step()
    version, tensors = published(other_model(), version=4)
    corrupt = [(name, tensor + 1e-3) for name, tensor in tensors]
    with pytest.raises(EngineError, match="expected checksum"):  # refused before anything is applied
        engine.load_weights(version, corrupt)
    with monkeypatch.context() as patch:
        model = worker_of(engine).get_model()
        patch.setattr(model, "load_weights", lost_midway(model.load_weights, arrive))
        with pytest.raises(EngineError, match=r"vLLM could not load it \(the connection is gone\); publish again"):
            engine.load_weights(version, tensors)
    assert not any(p.is_meta for p in model.parameters()), "layers still wait for the rest of the lost publication"
    assert engine.version is None
    assert engine.pending == 3
    with pytest.raises(EngineError, match="abort the pending samples and load_weights again"):
        engine.step()
    engine.load_weights(*published(long_model()))
    for sample, same in zip(collect_pending(engine)["g0"], undisturbed, strict=True):
        assert_same(sample, same)
    assert not core_of(engine).slots


def test_only_layers_of_which_something_has_changed_are_loaded_again_fused_ones_whole():
    engine, loaded = make_engine("llama", "vllm"), []
    model = worker_of(engine).get_model()
    load = model.load_weights
    model.load_weights = lambda tensors: load(loaded.append(name) or (name, tensor) for name, tensor in tensors)
    changed = make_model("llama")
    changed.model.layers[1].self_attn.q_proj.weight.data.mul_(2)
    changed.model.norm.weight.data.mul_(2)
    version, tensors = published(changed, version=4)
    new = {"model.layers.1.self_attn.q_proj.weight", "model.norm.weight"}
    engine.load_weights(version, tensors, [name for name, _ in tensors if name not in new])
    assert sorted(loaded) == sorted(new | {f"model.layers.1.self_attn.{part}_proj.weight" for part in "kv"})


def test_fused_and_tied_weights_are_read_back_after_loading(monkeypatch):
    for architecture, broken in (
        ("llama", "model.layers.1.self_attn.v_proj.weight"),
        ("qwen2", "model.layers.0.self_attn.k_proj.bias"),
        ("llama-tied", "model.embed_tokens.weight"),
        ("qwen3", "model.layers.0.mlp.up_proj.weight"),
    ):
        engine = make_engine(architecture, "vllm", bucket_bytes=2**14)  # several tensors, not all of a layer
        model = worker_of(engine).get_model()
        original = model.load_weights

        def damaged(tensors, original=original, broken=broken):
            return original([(n, t + (n == broken) * 1e-3) for n, t in tensors])

        monkeypatch.setattr(model, "load_weights", damaged)
        with pytest.raises(EngineError, match=broken):
            engine.load_weights(*published(make_model(architecture), version=4))
        assert engine.version is None
        with pytest.raises(EngineError, match="load_weights"):
            engine.add(make_request(0, 3))
        engine.close()


def test_samples_that_looked_too_narrowly_are_drawn_again(monkeypatch):
    """On a GPU a draw never waits; what then is not sure to be exact is decoded again, with draws that may wait."""
    engine = make_engine(kind="vllm")
    engine.careful = False
    step = decoding.latent_step
    monkeypatch.setattr(decoding, "latent_step", lambda *args, **settings: step(*args, **settings, top_m=8))
    with watched(engine) as params:
        groups = collect(engine, mixed_requests())
    sent = [p.extra_args[KEY]["careful"] for p in params]
    assert 0 < sum(sent) < len(sent) - sum(sent), "some samples needed more than eight ids, but not all"
    reference = collect(make_engine(), mixed_requests())
    for uid, group in groups.items():
        for a, b in zip(group, reference[uid], strict=True):
            assert_same(a, b)
    assert not core_of(engine).slots


def test_a_request_that_is_no_rollout_is_refused():
    from vllm import SamplingParams

    from latent_grpo.rollout_workers.vllm_plugin.settings import request_settings

    with pytest.raises(ValueError, match="start vLLM's server with `latent-grpo serve`"):
        request_settings(SimpleNamespace(sampling_params=SamplingParams(max_tokens=3)), None)


def test_vllms_own_warm_up_requests_are_no_rollouts_and_leave_nothing(monkeypatch):
    """On CUDA vLLM tries its kernels with made-up requests, without settings of ours, before the first rollout."""
    engine = long_engine(max_rows=4)
    worker = worker_of(engine)
    if not worker.use_v2_model_runner:
        pytest.skip("the V1 runner warms up without requests; make test-vllm-v2 runs this")
    from vllm.v1.worker.cpu_worker import CPUWorker
    from vllm.v1.worker.gpu.structured_outputs import StructuredOutputsWorker
    from vllm.v1.worker.gpu.warmup import warmup_kernels

    # Triton's interpreter has no masks of this kernel's type; grammars have no part in rollouts
    monkeypatch.setattr(StructuredOutputsWorker, "apply_grammar_bitmask", lambda *args, **kwargs: None)
    # CUDA's worker does this; the CPU's, whose class stands behind ours here, does not
    monkeypatch.setattr(
        CPUWorker,
        "compile_or_warm_up_model",
        lambda self: warmup_kernels(self.model_runner, self.execute_model, self.sample_tokens),
    )
    worker.compile_or_warm_up_model()
    assert not worker.latent_core.slots
    requests = long_requests(groups=1, samples=2)
    assert CHECK.redrawn(long_model(), requests, collect(engine, requests)).latent_gaps
