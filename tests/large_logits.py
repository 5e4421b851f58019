"""A small model whose logits are as large as a trained one's, and what engine and learner make of it.

Random models have small logits, so no test of theirs sees what rounding does to large ones.
"""

from __future__ import annotations

import numpy as np
import torch
from engine_driving import published

from latent_grpo.common.schema import TrajectoryBatch, encode
from latent_grpo.common.types import GroupRequest, SamplingSettings, TokenFacts
from latent_grpo.learner.batching import ReplayInputs, collate
from latent_grpo.learner.policy import PolicyModule
from latent_grpo.rollout_workers.engine import generate
from latent_grpo.rollout_workers.transformers_engine import TransformersEngine

LARGEST = 36.0  # of a position's logits: SmolLM2-135M has 24 before and 36 after Latent-SFT (docs/numerics.md)
SPREAD, COMMON = 2.5, 16  # standard deviation of a position's logits; dimensions that raise all of them alike
VOCAB, END, EOS, K = 2000, 5, 1, 10
FACTS = TokenFacts(vocab_size=VOCAB, allowed=np.ones(VOCAB, bool), latent_end_id=END, eos_ids=(EOS,), pad_id=0)


def make_model(tied=False, dtype=torch.bfloat16):
    from transformers import AutoModelForCausalLM, LlamaConfig

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=VOCAB, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.05, tie_word_embeddings=tied,
        )  # fmt: skip
        return AutoModelForCausalLM.from_config(config).to(dtype).eval()


def large_logits(dtype=torch.bfloat16):
    """An untied model whose largest logit of a position is about `LARGEST`, as a trained model's is.

    Trained models have a part of the hidden state that is alike everywhere and raises all logits alike. It changes no
    probability, but bfloat16 rounds the sum. Here it is the first `COMMON` dimensions.
    """
    model = make_model(dtype=torch.float32)
    embed, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    ids = torch.randint(6, VOCAB, (8, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        embed[:, :COMMON] = embed.std() * torch.linspace(3.0, 4.0, COMMON)
        head[:, :COMMON] = 0.0
        head.mul_(SPREAD / model(input_ids=ids).logits.std())
        hidden = model.base_model(input_ids=ids).last_hidden_state
        missing = LARGEST - (hidden @ head.T).amax(-1).mean()
        head[:, :COMMON] = missing / hidden[..., :COMMON].sum(-1).mean()
    return model.to(dtype)


def request(uid, **sampling):
    return GroupRequest(
        group_uid=f"g{uid}", problem_uid=f"p{uid}", task="t",
        prompt_ids=np.random.default_rng(uid).integers(6, VOCAB, size=10 + uid).astype(np.int32),
        sample_indices=(0, 1, 2, 3),
        sampling=SamplingSettings(**{"mode": "latent", "max_tokens": 24, "k": K} | sampling),
        purpose="self_test", epoch=0, run_seed=3, verifier="v", gold_answer="",
    )  # fmt: skip


def component_gaps(sampling, training, device="cpu"):
    """|learner - engine| of the latent components of rollouts of `sampling`, computed again by `training`; the inputs.

    The two hold the same weights.
    """
    engine = TransformersEngine(sampling, FACTS, max_rows=32, device=device)
    engine.load_weights(*published(sampling))
    samples = [t for group in generate(engine, [request(i) for i in range(6)]) for t in group]
    engine.close()
    sequences = [(row,) for row in range(len(samples))]
    inputs: ReplayInputs = collate(TrajectoryBatch(encode(samples, K)), sequences, chunks=3).to(device)
    with torch.no_grad():
        gap = (PolicyModule(training.to(device))(inputs) - inputs.behaviour).abs()
    assert inputs.latent.sum() > 200
    return gap[inputs.latent].cpu().numpy(), inputs
