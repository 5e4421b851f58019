"""METHOD §7b: the two masks, the three steps, and labels that the decoder really reads."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch

from latent_grpo.common.config import NewModelConfig, PromptConfig
from latent_grpo.common.models import make_model
from latent_grpo.common.prompts import PromptRenderer, resolve_tokens
from latent_grpo.common.tasks.arithmetic import ChainArithmetic, make_arithmetic_tokenizer
from latent_grpo.learner.sft import module as latent_sft
from latent_grpo.learner.sft.induction import (
    PHASES,
    InducedChains,
    InductionModule,
    collate,
    decoder_layout,
    encoder_layout,
    label_ids,
)
from latent_grpo.learner.sft.rows import encode_chain
from latent_grpo.learner.sft.soft_labels import Chain, UniformChains, chain_length

C = K = 3
TOKENIZER = make_arithmetic_tokenizer()
FACTS = resolve_tokens(TOKENIZER, len(TOKENIZER), latent=True)
RENDERER = PromptRenderer(TOKENIZER, PromptConfig())
SLOT = FACTS.latent_end_id
ALLOWED = label_ids(FACTS.allowed, SLOT)


def small_model(hidden=32, architecture="llama", seed=0):
    config = NewModelConfig(architecture=architecture, hidden_size=hidden, intermediate_size=2 * hidden, num_heads=4)
    return make_model(config, TOKENIZER, seed)


def row(index, operations=2):
    problem = ChainArithmetic(name="a", operations=operations).problem(index)
    chain = encode_chain(TOKENIZER, problem.cot, problem.answer, c=C, latent_end_id=SLOT)
    return chain.row(RENDERER.encode(problem), c=C, k=K)


def batch_of(indices, operations=2):
    rows = [row(i, operations) for i in indices]
    return collate(rows, c=C, slot_id=SLOT, pad_id=FACTS.pad_id)


def module_of(phase="union", **sizes):
    model = small_model(**sizes)
    return InductionModule(copy.deepcopy(model), model, k=K, phase=phase, allowed=ALLOWED, chunk_tokens=16)


PROMPT, COT, HARD = np.array([1, 2]), np.array([11, 12, 13, 14, 15]), np.array([91, 92, 93])


# --- layouts


def test_encoder_reads_the_chain_with_a_slot_after_every_c_tokens():
    layout = encoder_layout(PROMPT, COT, 2, slot_id=0)
    assert layout.ids.tolist() == [1, 2, 11, 12, 0, 13, 14, 0, 15, 0]
    assert layout.slots.nonzero()[0].tolist() == [4, 7, 9]
    # slots do not move the text: it has the positions it would have without them
    assert layout.positions[~layout.slots].tolist() == list(range(7))
    for i in range(10):
        seen = set(layout.visible[i].nonzero()[0])
        assert seen == {j for j in range(i + 1) if not layout.slots[j]} | {i}


def test_decoder_sees_what_the_supervision_mask_says():
    layout = decoder_layout(PROMPT, COT, HARD, 2, slot_id=0)
    assert layout.ids.tolist() == [1, 2, 0, 13, 14, 0, 15, 0, 91, 92, 93]
    prompt, slots, answer = {0, 1}, [2, 5, 7], {8, 9, 10}
    segments = {3: [3, 4], 4: [3, 4], 6: [6]}
    for i in range(11):
        seen = set(layout.visible[i].nonzero()[0])
        if i in prompt:
            expected = {j for j in prompt if j <= i}
        elif i in slots:
            expected = prompt | {s for s in slots if s <= i}
        elif i in answer:
            expected = prompt | set(slots) | {j for j in answer if j <= i}
        else:
            before = max(s for s in slots if s < i)
            expected = {before} | {j for j in segments[i] if j <= i}
        assert seen == expected, i
    assert layout.text.nonzero()[0].tolist() == [3, 4, 6]
    assert layout.answer.nonzero()[0].tolist() == [8, 9, 10]
    assert layout.positions[slots].tolist() == [2, 3, 4]  # as latent steps lie at inference
    assert layout.positions[8:].tolist() == [5, 6, 7]
    assert layout.positions[3:5].tolist() == [3, 4]  # text goes on from its slot


@pytest.mark.parametrize("length", [1, 2, 3, 4, 7])
def test_both_sides_have_the_same_slots_and_as_many_as_the_chain_has_steps(length):
    cot = np.arange(length) + 1
    encoder, decoder = encoder_layout(PROMPT, cot, 3, 0), decoder_layout(PROMPT, cot, HARD, 3, 0)
    assert encoder.slots.sum() == decoder.slots.sum() == chain_length(length, 3)
    assert decoder.text.sum() == max(length - 3, 0)


# --- the models


def test_the_answer_is_read_exactly_as_in_stage_2():
    """The same mixtures through both stages: the answer's cross-entropy agrees, so nothing is learned in vain."""
    module, rows = module_of(), [row(i) for i in range(4)]
    parts = module(collate(rows, c=C, slot_id=SLOT, pad_id=FACTS.pad_id))
    source = InducedChains(
        module.encoder.model, c=C, k=K, latent_end_id=SLOT, allowed=FACTS.allowed, pad_id=FACTS.pad_id
    )
    chains = source.chains([r.prompt_ids for r in rows], [r.cot_ids for r in rows])
    labelled = [dataclasses.replace(r, chain=chain) for r, chain in zip(rows, chains, strict=True)]
    quiet = latent_sft.collate(labelled, [0] * 4, k=K, pad_id=FACTS.pad_id, perturb_share=0.0, self_feeding=0.0)
    stage_2 = latent_sft.LatentSFTModule(module.decoder, k=K)(quiet)
    torch.testing.assert_close(parts.answer_sum, stage_2.hard_sum, rtol=1e-4, atol=1e-4)
    assert parts.answer_count == stage_2.hard_count


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gpt2"])
def test_every_architecture_respects_the_masks(architecture):
    module, batch = module_of(architecture=architecture), batch_of(range(3))
    with torch.no_grad():
        before = module(batch)
        ids = batch.decoder.ids.clone()
        ids[batch.decoder.text] = TOKENIZER.convert_tokens_to_ids("+")
        after = module(dataclasses.replace(batch, decoder=dataclasses.replace(batch.decoder, ids=ids)))
        torch.testing.assert_close(after.answer_sum, before.answer_sum)  # the answer sees no text
        assert not torch.isclose(after.text_sum, before.text_sum)
        longer = batch_of([0, 1, 2, 9], operations=2)
        one_by_one = [module(batch_of([i])) for i in (0, 1, 2, 9)]
        together = module(longer)
    for name in ("text_sum", "answer_sum", "anchor_sum"):
        total = sum(getattr(parts, name) for parts in one_by_one)
        torch.testing.assert_close(getattr(together, name), total, rtol=1e-4, atol=1e-3)


def test_padding_changes_nothing():
    module = module_of()
    with torch.no_grad():
        rows = [row(0, operations=1), row(1, operations=3)]
        together = module(collate(rows, c=C, slot_id=SLOT, pad_id=FACTS.pad_id))
        alone = [module(collate([r], c=C, slot_id=SLOT, pad_id=FACTS.pad_id)) for r in rows]
    torch.testing.assert_close(together.answer_sum, alone[0].answer_sum + alone[1].answer_sum, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(together.text_sum, alone[0].text_sum + alone[1].text_sum, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("phase", PHASES)
def test_each_step_trains_its_models_and_never_the_embeddings_of_labels(phase):
    module = module_of(phase)
    parts = module(batch_of(range(4)))
    parts.combine(1.0, 1.0, 1.0, anchor=1.0 if phase == "encoder" else 0.0).backward()
    learned = {n for n, p in module.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    sides = {name.partition(".")[0] for name in learned}
    assert sides == {"encoder": {"encoder"}, "decoder": {"decoder"}, "union": {"encoder", "decoder"}}[phase]
    assert not any("decoder.model.embed_tokens" in name for name in learned)


# --- the interface


SOURCES = {
    "uniform": UniformChains(C, K),
    "induced": InducedChains(
        small_model(), c=C, k=K, latent_end_id=SLOT, allowed=FACTS.allowed, pad_id=FACTS.pad_id, tokens_at_once=64
    ),
}


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_every_source_of_labels_keeps_the_interface(source):
    rows = [row(i, operations) for i, operations in enumerate((1, 2, 4, 1, 3))]
    chains = source.chains([r.prompt_ids for r in rows], [r.cot_ids for r in rows])
    for made, chain in zip(rows, chains, strict=True):
        assert isinstance(chain, Chain)
        assert chain.ids.shape == chain.labels.shape == (chain_length(len(made.cot_ids), C), K)
        np.testing.assert_allclose(chain.labels.sum(-1), 1.0, rtol=1e-5)
        assert (chain.labels >= 0).all()
        assert SLOT not in chain.ids
        assert FACTS.allowed[chain.ids].all()
    alone = source.chains([rows[2].prompt_ids], [rows[2].cot_ids])[0]
    np.testing.assert_array_equal(alone.ids, chains[2].ids)
    np.testing.assert_allclose(alone.labels, chains[2].labels, atol=1e-5)


# --- learning


def test_decoder_answers_better_from_induced_than_from_shuffled_latents():
    """All three steps on one-operation problems: the answer is read from the latents, not from the prompt."""
    torch.manual_seed(0)
    decoder = small_model(hidden=64)
    encoder = copy.deepcopy(decoder)
    first = 0
    for phase, steps in zip(PHASES, (35, 55, 10), strict=True):
        module = InductionModule(encoder, decoder, k=K, phase=phase, allowed=ALLOWED)
        parameters = [p for p in module.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=3e-3, betas=(0.9, 0.98), weight_decay=0.01)
        for _ in range(steps):
            parts = module(batch_of(range(first, first + 64), operations=1))
            counts = [float(n) for n in (parts.text_count, parts.answer_count, parts.slot_count)]
            parts.combine(*counts, anchor=1.0 if phase == "encoder" else 0.0).backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            module.zero_grad()
            first += 64
    held_out = batch_of(range(10**6, 10**6 + 128), operations=1)
    with torch.no_grad():
        induced, shuffled = (module(dataclasses.replace(held_out, shuffled=s)) for s in (False, True))
    own, other = (float(parts.answer_sum / parts.answer_count) for parts in (induced, shuffled))
    assert own < 0.2
    assert other > own + 0.3
