"""The architectures of `common.model_limits.COMPARED`: what the engine samples are the log-probs of Hugging Face's own
forward pass, at a full precision that no wrong mask, position or cache could reach.

Tiny models with drawn weights, made on the spot; those that people train most run in `make test`, the others are slow.
`docs/models.md` has the same list as a table.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from engine_driving import published
from model_folders import ROWS, model, tokenizer

from latent_grpo.common.config import ConfigError
from latent_grpo.common.model_check import check_model
from latent_grpo.common.model_limits import COMPARED, window_of
from latent_grpo.common.models import load_model, output_facts
from latent_grpo.common.prompts import resolve_tokens
from latent_grpo.common.types import GroupRequest, SamplingSettings, Trajectory
from latent_grpo.rollout_workers.engine import generate
from latent_grpo.rollout_workers.requests import RequestRefused
from latent_grpo.rollout_workers.transformers_engine import TransformersEngine

STEPS, PROMPTS = 16, (40, 33, 21)
LARGEST_GAP = 1e-5  # nats; they agree within 2e-6
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
MISTRAL_LIKE = {"sliding_window": None, "head_dim": 8}
QUICK = {
    "llama": {},
    "llama, tied": {"tie_word_embeddings": True},
    "llama, yarn": {"rope_parameters": YARN},
    "llama, llama3": {"rope_parameters": LLAMA3},
    "llama, unread window": {"sliding_window": 0},
    "qwen2": {},
    "qwen2, one window for all": {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1},
    "qwen3": {"head_dim": 8},
    "gpt2": {},
    "mistral": MISTRAL_LIKE,
    "mistral, window": MISTRAL_LIKE | {"sliding_window": 64},
    "gemma": {"head_dim": 8},
    "phi3": {"sliding_window": None},
    "olmo2": {},
    "smollm3": {},
}
SLOW = {
    "qwen2_moe": EXPERTS | {"shared_expert_intermediate_size": 24},
    "qwen3_moe": EXPERTS | {"head_dim": 8},
    "mixtral": MISTRAL_LIKE | {"num_local_experts": 4},
    "phi": {},
    "stablelm": {},
    "gpt_neox": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "falcon": {"alibi": False},
    "falcon, multi-query": {"alibi": False, "multi_query": True, "new_decoder_architecture": False},
    "glm4": {"head_dim": 8},
    "starcoder2": {"sliding_window": None},
    "granite": {"logits_scaling": 1.0},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "logits_scaling": 1.0},
    "olmo": {},
    "olmoe": EXPERTS,
    "nemotron": {},
    "seed_oss": {"head_dim": 8},
    "ernie4_5": {"head_dim": 8},
    "hunyuan_v1_dense": {"head_dim": 8},
    "glm": {"head_dim": 8},
    "glm4_moe": {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8, "n_group": 1,
        "topk_group": 1,
    },
    "phimoe": {"num_local_experts": 4, "sliding_window": None},
    "helium": {"head_dim": 8},
    "arcee": {},
    "apertus": {},
    "persimmon": {},
    "gpt_bigcode": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256},
    "exaone4": {"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]},
    "gemma3_text": {"head_dim": 8, "sliding_window": 64},
    "olmo3": {"sliding_window": 64},
}  # fmt: skip
CASES = [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]


def request(uid: str, mode: str, length: int, steps: int = STEPS) -> GroupRequest:
    ids = np.random.default_rng(length).integers(8, 260, length).astype(np.int32)
    sampling = SamplingSettings(mode=mode, max_tokens=steps, temperature=1.3, top_p=1.0, top_k=ROWS, k=3)
    return GroupRequest(
        group_uid=uid, problem_uid=uid, task="t", prompt_ids=ids, sample_indices=(0, 1), sampling=sampling,
        purpose="training", epoch=0, run_seed=0, verifier="number", gold_answer="1",
    )  # fmt: skip


@torch.no_grad()
def gaps(own: torch.nn.Module, sample: Trajectory) -> list[float]:
    """How far recorded log-probs are from those of the model's own pass over prompt, mixtures and visible ids."""
    embed, prompt = own.get_input_embeddings(), len(sample.prompt_ids)
    rows = [embed(torch.from_numpy(sample.prompt_ids.astype(np.int64)))]
    for ids, scores in zip(sample.latent_ids, sample.latent_scores, strict=True):
        weights = torch.softmax(torch.from_numpy(scores) / sample.sampling.tau, -1)
        rows.append((embed(torch.from_numpy(ids.astype(np.int64))) * weights[:, None]).sum(0, keepdim=True))
    rows.append(embed(torch.from_numpy(sample.hard_ids.astype(np.int64))))
    logits = own(inputs_embeds=torch.cat(rows)[None], use_cache=False).logits[0, prompt - 1 :].float()
    latent = len(sample.latent_ids)
    plain = torch.log_softmax(logits, -1).numpy()
    visible = torch.log_softmax(logits / sample.sampling.temperature, -1).numpy()
    found = [abs(plain[i][ids] - sample.latent_log_probs[i]).max() for i, ids in enumerate(sample.latent_ids)]
    return found + [abs(visible[latent + i][id_] - sample.hard_log_probs[i]) for i, id_ in enumerate(sample.hard_ids)]


def made(folder: Path, name: str, **settings) -> TransformersEngine:
    """An engine with a model of that architecture, which passed the checks of a folder."""
    own = model(name.partition(",")[0], **settings)
    own.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    assert [line for line in check_model(folder) if "never compared" in line] == []
    rows, ends = output_facts(folder)
    engine = TransformersEngine(load_model(folder), resolve_tokens(tokenizer(), rows, True, "</think>", ends))
    engine.load_weights(*published(load_model(folder)))
    return engine


@pytest.mark.parametrize("name", CASES)
def test_samples_have_the_log_probs_of_the_models_own_forward_pass(tmp_path, name):
    engine = made(tmp_path, name, **(QUICK | SLOW)[name])
    requests = [request(f"{mode}{n}", mode, n) for mode in ("latent", "visible") for n in PROMPTS]
    samples = [sample for group in generate(engine, requests) for sample in group]
    own = load_model(tmp_path)
    found = [gap for sample in samples for gap in gaps(own, sample)]
    assert len(found) > 50
    assert max(found) < LARGEST_GAP


def test_the_list_of_architectures_is_the_one_that_is_compared():
    assert {name.partition(",")[0] for name in (*QUICK, *SLOW)} == set(COMPARED)
    table = (Path(__file__).resolve().parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    assert [kind for kind, names in COMPARED.items() if f"| `{kind}` | {names} |" not in table] == []


@pytest.mark.parametrize("name", ["mistral, window", "qwen2, one window for all"])
def test_beyond_its_window_a_model_is_not_sampled(tmp_path, name):
    """What the engine would draw there is another policy than the model's: it attends to everything."""
    engine = made(tmp_path, name, **(QUICK | SLOW)[name])
    engine.add(request("fits", "visible", 64 - STEPS))
    with pytest.raises(RequestRefused, match=r"prompt of 49 tokens and max_tokens=16 do not fit .* 64 positions"):
        engine.add(request("longer", "visible", 64 - STEPS + 1))


def test_an_architecture_outside_of_the_list_is_said(tmp_path):
    model("biogpt").save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    (line,) = check_model(tmp_path)
    assert "the architecture biogpt was never compared with Hugging Face's own forward pass (docs/models.md" in line


NOT_SERVED = {
    "gemma2": ({"head_dim": 8}, r"final_logit_softcapping 30"),
    "granite": ({"logits_scaling": 8.0}, r"logits_scaling 8"),
    "cohere": ({}, r"logit_scale 0\.0625"),
    "bloom": ({"n_head": 4}, r"positions are alibi \(bloom\)"),
    "mpt": ({"d_model": 32, "n_heads": 4, "n_layers": 2}, r"positions are alibi \(mpt\)"),
    "falcon": ({"alibi": True}, r"positions are alibi \(alibi in its config\.json\)"),
    "gpt_oss": ({}, r"cannot compute the attention of gpt_oss by PyTorch's own \(sdpa\)"),
    "llama4_text": ({}, r"its class has no base model"),
    "xlnet": ({"d_head": 8}, r"it is an encoder \(xlnet\)"),
    "mamba": ({}, r"layers of this mamba are no attention over all that came before"),
    "lfm2": ({"layer_types": ["conv", "full_attention"]}, r"no attention over all that came before \(conv\)"),
    "bert": ({}, r"it is an encoder \(bert\), which looks ahead"),
    "deepseek_v3": ({"num_hidden_layers": 1, "n_routed_experts": 8}, r"compressed keys and values"),
}


@pytest.mark.parametrize("name", NOT_SERVED)
def test_what_the_engine_cannot_serve_is_decided_from_the_configuration(tmp_path, name):
    settings, message = NOT_SERVED[name]
    from transformers import AutoConfig

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": ROWS}
    AutoConfig.for_model(name, **(sizes | settings)).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=message):
        check_model(tmp_path)


MIXED, LOCAL = ["full_attention", "sliding_attention"], [[["global", "local"], 1]]
LONGROPE = {
    "rope_parameters": {
        "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4,
    },
    "original_max_position_embeddings": 96,
}  # fmt: skip
WINDOWS = {
    "no window": ("mistral", {"sliding_window": None}, None),
    "of all layers": ("mistral", {"sliding_window": 48}, 48),
    "of nothing": ("mistral", {"sliding_window": 0}, 0),
    "of nothing in some layers": ("qwen3", {"sliding_window": 0, "use_sliding_window": True, "layer_types": MIXED}, 0),
    "of nothing, and not read": ("llama", {"sliding_window": 0}, None),
    "below nothing, and not read": ("gpt2", {"sliding_window": -1}, None),
    "not wanted, and not read": ("llama", {"sliding_window": False}, None),
    "wanted, and not read": ("llama", {"sliding_window": True}, None),
    "switched off": ("qwen2", {"use_sliding_window": False, "sliding_window": 48}, None),
    "of some layers": ("qwen2", {"use_sliding_window": True, "sliding_window": 48, "max_window_layers": 1}, 48),
    "of no layer": ("qwen2", {"use_sliding_window": True, "sliding_window": 48, "max_window_layers": 2}, None),
    "by layer types": ("qwen3", {"sliding_window": 48, "use_sliding_window": True, "layer_types": MIXED}, 48),
    "by a pattern": ("gemma3_text", {"sliding_window": 40}, 40),
    "in chunks": ("llama4_text", {"attention_chunk_size": 32}, 32),
    "local layers": ("gpt_neo", {"window_size": 24, "attention_types": LOCAL, "num_layers": 2}, 24),
    "positions that change": ("phi3", LONGROPE | {"sliding_window": None}, 96),
}  # fmt: skip


@pytest.mark.parametrize("case", WINDOWS)
def test_a_window_is_found_in_any_of_its_spellings(case):
    from transformers import AutoConfig

    name, settings, steps = WINDOWS[case]
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 512}
    if name == "gpt_neo":
        sizes = {"hidden_size": 32}
    found = window_of(AutoConfig.for_model(name, **(sizes | settings)))
    assert (found and found.steps) == steps
