"""METHOD §7: chains of superposition, their losses, perturbation and self-feeding."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from latent_grpo.common.config import NewModelConfig, PromptConfig
from latent_grpo.common.models import make_model
from latent_grpo.common.prompts import PromptRenderer, resolve_tokens
from latent_grpo.common.tasks.arithmetic import ChainArithmetic, make_arithmetic_tokenizer
from latent_grpo.learner.sft.learner import least_calls, plan_rows
from latent_grpo.learner.sft.module import LatentSFTModule, collate, means, perturb, row_key
from latent_grpo.learner.sft.rows import SFTRow, encode_chain
from latent_grpo.learner.sft.soft_labels import build_chain

K, C = 3, 3
TOKENIZER = make_arithmetic_tokenizer()
FACTS = resolve_tokens(TOKENIZER, len(TOKENIZER), latent=True)
RENDERER = PromptRenderer(TOKENIZER, PromptConfig())


def small_model(hidden: int = 32, architecture: str = "llama"):
    config = NewModelConfig(architecture=architecture, hidden_size=hidden, intermediate_size=2 * hidden, num_heads=4)
    return make_model(config, TOKENIZER, seed=0)


def row(index: int, operations: int = 2, explicit: bool = False) -> SFTRow:
    problem = ChainArithmetic(name="a", operations=operations).problem(index)
    chain = encode_chain(
        TOKENIZER, problem.cot, problem.answer, c=C, latent_end_id=FACTS.latent_end_id, explicit=explicit
    )
    return chain.row(RENDERER.encode(problem), c=C, k=K)


def solution_ids(text: str) -> np.ndarray:
    chain = encode_chain(TOKENIZER, "1+1=2;", "2", c=C, latent_end_id=FACTS.latent_end_id, solution=text)
    return chain.hard_ids.astype(np.int64)


def batch_of(indices, operations=2, explicit=False, step=0, **shares):
    rows = [row(i, operations, explicit) for i in indices]
    return collate(rows, [row_key(0, step, i) for i in indices], k=K, pad_id=FACTS.pad_id, **shares)


QUIET = {"perturb_share": 0.0, "self_feeding": 0.0}


# --- chains


def test_chain_is_a_uniform_superposition_with_equal_tokens_merged():
    chain = build_chain([5, 6, 7, 8, 8, 9, 4], c=3, k=4)
    assert chain.ids[0, :3].tolist() == [5, 6, 7]
    np.testing.assert_allclose(chain.labels[0], [1 / 3, 1 / 3, 1 / 3, 0])
    assert chain.ids[1, :2].tolist() == [8, 9]
    np.testing.assert_allclose(chain.labels[1], [2 / 3, 1 / 3, 0, 0])
    np.testing.assert_allclose(chain.labels[2], [1, 0, 0, 0])  # the last step is shorter
    assert chain.ids[2].tolist() == [4] * 4


def test_latent_end_token_is_never_in_a_label():
    chain = build_chain([5, 20, 6, 20, 20, 7], c=2, k=2, latent_end_id=20)
    assert 20 not in chain.ids
    assert len(chain.ids) == 2
    assert build_chain([20, 20], c=2, k=2, latent_end_id=20).ids.shape == (0, 2)


def test_step_must_hold_its_tokens():
    with pytest.raises(ValueError, match="k = 2 ids cannot hold c = 3"):
        build_chain([1, 2, 3], c=3, k=2)


def test_row_is_prompt_chain_end_of_thinking_answer_eos():
    latent, explicit = row(0), row(0, explicit=True)
    problem = ChainArithmetic(name="a", operations=2).problem(0)
    assert len(latent.chain.ids) == 4
    assert TOKENIZER.decode(latent.hard_ids) == f"</think>\\boxed{{{problem.answer}}}<eos>"
    assert latent.hard_ids[0] == FACTS.latent_end_id
    assert len(explicit.chain.ids) == 0
    assert TOKENIZER.decode(explicit.hard_ids) == f"{problem.cot}</think>\\boxed{{{problem.answer}}}<eos>"


@pytest.mark.parametrize("explicit", [False, True])
def test_a_solution_stands_whole_behind_the_end_of_thinking(explicit):
    """Behind a latent chain and behind an explicit one, with EOS at its end."""
    solution = "1+1=2;\\boxed{2}"
    chain = encode_chain(
        TOKENIZER, "1+1=2;", "2", c=C, latent_end_id=FACTS.latent_end_id, explicit=explicit, solution=solution
    )
    text = TOKENIZER.decode(chain.hard_ids, skip_special_tokens=False)
    assert text.replace(" ", "").endswith(f"</think>{solution}{TOKENIZER.eos_token}")
    assert text.replace(" ", "").startswith("1+1=2;" if explicit else "</think>")


def test_row_without_chain_of_thought_is_refused():
    with pytest.raises(ValueError, match="empty one"):
        encode_chain(TOKENIZER, " ", "1", c=C, latent_end_id=FACTS.latent_end_id)


# --- batches


def test_batch_marks_every_response_position_once():
    rows = [row(0, operations=2), row(1, operations=4)]
    batch = collate(rows, [1, 2], k=K, pad_id=FACTS.pad_id)
    for i, r in enumerate(rows):
        response = batch.latent[i] | batch.hard_target[i]
        assert not (batch.latent[i] & batch.hard_target[i]).any()
        assert response.sum() == len(r) - len(r.prompt_ids)
        assert not response[: len(r.prompt_ids)].any()
        assert batch.attention[i].sum() == len(r)
    assert batch.counts == (4 + 8, 5 + 5)
    assert not (batch.feed & ~batch.latent).any()
    torch.testing.assert_close(batch.labels.sum(-1), batch.latent.float())


def test_a_rows_randomness_does_not_depend_on_its_batch():
    together, alone = batch_of(range(6)), batch_of([4])
    width = alone.feed.shape[1]
    assert torch.equal(together.feed[4, :width], alone.feed[0])
    assert together.perturbed[4] == alone.perturbed[0]
    many = batch_of(range(400))
    for share in (many.perturbed, many.feed_noisy, many.feed[many.latent]):
        assert 0.4 < share.float().mean() < 0.6


# --- losses


def test_loss_is_kl_at_latent_and_cross_entropy_at_hard_positions():
    model = small_model()
    batch = batch_of(range(3), **QUIET)
    parts = LatentSFTModule(model, k=K, chunk_tokens=4)(batch)

    embedding = model.get_input_embeddings().weight
    inputs = embedding[batch.hard_ids]
    mixed = (embedding[batch.mixture_ids] * batch.labels.unsqueeze(-1)).sum(-2)
    inputs = torch.where(batch.latent.unsqueeze(-1), mixed, inputs)
    log_p = model(inputs_embeds=inputs, attention_mask=batch.attention.long()).logits.log_softmax(-1)
    kl = hard = 0.0
    for b, t in batch.latent.nonzero().tolist():
        dense = torch.zeros(len(TOKENIZER)).index_add(0, batch.mixture_ids[b, t], batch.labels[b, t])
        kl += (torch.xlogy(dense, dense) - dense * log_p[b, t - 1]).sum()
    for b, t in batch.hard_target.nonzero().tolist():
        hard -= log_p[b, t - 1, batch.hard_ids[b, t]]
    torch.testing.assert_close(parts.latent_sum, kl, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(parts.hard_sum, hard, rtol=1e-4, atol=1e-4)
    assert (parts.latent_count, parts.hard_count) == batch.counts
    torch.testing.assert_close(
        torch.stack(means(parts)), torch.stack((kl / parts.latent_count, hard / parts.hard_count))
    )


def test_sums_of_two_halves_are_the_sums_of_the_whole():
    module = LatentSFTModule(small_model(), k=K, allowed=FACTS.allowed)
    whole, *halves = (module(batch_of(i)) for i in (range(6), range(3), range(3, 6)))
    torch.testing.assert_close(whole.latent_sum, halves[0].latent_sum + halves[1].latent_sum, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(whole.hard_sum, halves[0].hard_sum + halves[1].hard_sum, rtol=1e-4, atol=1e-4)


def test_the_step_is_the_same_however_its_rows_are_packed():
    """Rows of 20 to 200 tokens: the two means are over the step's positions (METHOD §7), not over micro-batches."""
    long = "".join(f"{n}+1={n + 1};" for n in range(1, 9)) * 4 + "\\boxed{9}"
    rows = [row(0), row(1, operations=6), row(2), replace(row(3), hard_ids=solution_ids(long)), row(4, operations=4)]
    latent, hard = sum(len(r.chain.ids) for r in rows), sum(len(r.hard_ids) for r in rows)

    def step(ranks: int, budget: int):
        module = LatentSFTModule(small_model(), k=K, allowed=FACTS.allowed)
        plan = plan_rows([len(r) for r in rows], ranks, budget)
        calls = least_calls(plan, rows, chunk_tokens=16, feed=True)
        found = torch.zeros(2)
        for pieces in plan:
            for piece, least in zip(pieces, calls, strict=True):
                keys = [row_key(0, 0, i) for i in piece.rows]
                batch = collate([rows[i] for i in piece.rows], keys, k=K, pad_id=FACTS.pad_id, calls=least)
                both = torch.stack(means(module(batch), latent, hard)) * float(piece.counts)
                both.sum().backward()
                found += both.detach()
        return found, {name: p.grad for name, p in module.named_parameters()}, sum(map(len, plan))

    whole, gradients, passes = step(1, 10_000)
    assert passes == 1
    for ranks, budget, expected in [(1, 1, 5), (1, 220, 2), (2, 220, 4)]:
        losses, found, passes = step(ranks, budget)
        assert passes == expected
        torch.testing.assert_close(losses, whole, rtol=1e-5, atol=1e-5)
        for name, gradient in gradients.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("shares", [QUIET, {"perturb_share": 1.0, "self_feeding": 1.0}])
def test_no_gradient_reaches_the_embedding_through_a_mixture(shares):
    model = small_model()
    batch = batch_of(range(4), **shares)
    sum(means(LatentSFTModule(model, k=K, allowed=FACTS.allowed)(batch))).backward()
    gradient = model.get_input_embeddings().weight.grad
    hard_inputs = set(batch.hard_ids[batch.attention & ~batch.latent].tolist())
    touched = set(gradient.abs().sum(-1).nonzero().flatten().tolist())
    assert touched <= hard_inputs
    only_in_chains = set(batch.mixture_ids[batch.latent].flatten().tolist()) - hard_inputs
    assert only_in_chains  # `=` and `;` occur in the chain alone
    assert not touched & only_in_chains


def test_explicit_rows_are_ordinary_cross_entropy():
    model = small_model()
    batch = batch_of(range(3), explicit=True)
    parts = LatentSFTModule(model, k=K)(batch)
    logits = model(input_ids=batch.hard_ids, attention_mask=batch.attention.long()).logits
    targets = batch.hard_ids.masked_fill(~batch.hard_target, -100)
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), targets[:, 1:], reduction="sum")
    torch.testing.assert_close(parts.hard_sum, expected, rtol=1e-4, atol=1e-4)
    assert parts.latent_sum == 0
    sum(means(parts)).backward()


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_recomputed_layers_give_the_same_gradients(architecture):
    batch = batch_of(range(4))
    gradients = []
    for recompute in (False, True, 1):
        module = LatentSFTModule(
            small_model(architecture=architecture), k=K, allowed=FACTS.allowed, gradient_checkpointing=recompute
        ).train(False)
        sum(means(module(batch))).backward()
        gradients.append({name: p.grad for name, p in module.named_parameters()})
    for name, expected in gradients[0].items():
        for found in gradients[1:]:
            torch.testing.assert_close(found[name], expected, msg=name)


# --- perturbation and self-feeding


def test_perturbation_stays_on_the_support_and_is_a_distribution():
    labels = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]])
    gumbel = torch.tensor([[2.0, -9.0, 99.0], [0.3, 0.1, 0.2]])
    weights = perturb(labels, gumbel, scale=1.0, tau=1.0)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2))
    assert (weights[labels == 0] == 0).all()
    # one-sided: 2.0 -> 3.5 and -9 -> 0
    torch.testing.assert_close(weights[0, :2], torch.softmax(torch.tensor([3.5, 0.0]), -1))
    torch.testing.assert_close(perturb(labels, gumbel, scale=0.0, tau=1.0), labels)


def test_perturbed_rows_differ_from_quiet_ones_and_the_others_do_not():
    module = LatentSFTModule(small_model(), k=K)
    batch = batch_of(range(20), self_feeding=0.0)
    weights = module.label_weights(batch)
    changed = (weights != batch.labels).flatten(1).any(-1)
    assert torch.equal(changed, batch.perturbed)
    torch.testing.assert_close(weights.sum(-1), batch.latent.float())


def test_self_feeding_replaces_fed_positions_only_and_needs_no_gradient():
    module = LatentSFTModule(small_model(), k=K, allowed=FACTS.allowed)
    batch = batch_of(range(12), perturb_share=0.0)
    inputs = module.mixed_inputs(batch, batch.labels)
    fed = module.self_fed(batch, inputs)
    changed = (fed != inputs).any(-1)
    assert torch.equal(changed, batch.feed)
    assert not module.own_mixtures(batch, inputs).requires_grad


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "gpt2"])
def test_other_architectures_give_a_finite_loss(architecture):
    module = LatentSFTModule(small_model(architecture=architecture), k=K, allowed=FACTS.allowed)
    loss = sum(means(module(batch_of(range(3)))))
    loss.backward()
    assert torch.isfinite(loss)


# --- learning


def test_training_teaches_the_chain():
    """One operation, a small model: the latent loss falls far below the label's mere frequencies."""
    torch.manual_seed(0)
    module = LatentSFTModule(small_model(hidden=64), k=K, allowed=FACTS.allowed).train()
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.01)
    losses = []
    for step in range(80):
        batch = batch_of(range(step * 96, step * 96 + 96), operations=1, step=step)
        loss = sum(means(module(batch)))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert np.mean(losses[-5:]) < 0.3 * losses[0]
    assert np.mean(losses[-5:]) < 0.75 * np.mean(losses[25:30])
