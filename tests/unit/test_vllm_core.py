"""The decoder without vLLM: prefill, preemption and discarded steps, with draws that wait and that do not."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
import torch
from waiting import COPYING, WAITING, Without

from latent_grpo.common.latent import mix_embeddings
from latent_grpo.common.types import GroupRequest, PolicyVersion, SamplingSettings, TokenFacts
from latent_grpo.rollout_workers.decoding import SCRATCH, Decoder
from latent_grpo.rollout_workers.engine import RequestRefused
from latent_grpo.rollout_workers.requests import admit, sample_settings
from latent_grpo.rollout_workers.vllm_plugin.prefix_cache import keep_histories_apart
from latent_grpo.rollout_workers.vllm_plugin.settings import KEY, extra_args

VOCAB, END, PROMPT = 400, 5, 3


def group(samples=4, **sampling):
    settings = {"mode": "latent", "max_tokens": 12, "k": 3} | sampling
    return GroupRequest(
        group_uid="g", problem_uid="p", task="t", prompt_ids=np.arange(PROMPT, dtype=np.int32) + 7,
        sample_indices=tuple(range(samples)), sampling=SamplingSettings(**settings), purpose="training", epoch=0,
        run_seed=1, verifier="v", gold_answer="",
    )  # fmt: skip


def settings_of(request, careful):
    found = []
    for row in sample_settings(request, 0):
        described = dict(extra_args(0, row, careful)[KEY])
        described.pop("uid")
        found.append(described)
    return found


def new_core(slots=8, steps=1, width=1):
    return Decoder(
        torch.device("cpu"), slots=slots, steps=steps, width=width, allowed=None, end_id=END, placeholder=END
    )


def logits_at(uid, step, scale=3.0):
    """A model that knows nothing but who asks and when."""
    generator = torch.Generator().manual_seed(uid * 1000 + step)
    logits = torch.randn(VOCAB, generator=generator) * scale
    if step == 3 + uid % 4 * 3:
        logits[END] += 6 * scale  # here and there somebody leaves latent mode
    return logits


def decode(core, requests, careful=True, scale=3.0):
    """Requests of different settings side by side, twelve steps each; their records."""
    uids = []
    for request in requests:
        for settings in settings_of(request, careful):
            uids.append(len(uids))
            core.add(uids[-1], PROMPT, settings)
    slots = np.array([core.slots[uid] for uid in uids])
    for step in range(12):
        logits = torch.stack([logits_at(uid, step, scale) for uid in uids])
        positions = torch.full((len(uids),), PROMPT - 1 + step)
        core.draw(logits, slots, positions, torch.ones(len(uids), dtype=torch.bool))
    return core.take(uids, [12] * len(uids)).records()


def assert_equal(a, b):
    for name in ("latent_ids", "latent_scores", "latent_log_probs", "hard_ids", "hard_log_probs"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)


MIXED = [
    group(),
    group(noise_mode="off", k=5),
    group(noise_mode="two_sided", noise_scale=0.5, tau=0.7, top_p=0.8, latent_exit="first"),
    group(mode="visible", temperature=1.3, top_k=7),
]


def test_draws_that_never_wait_are_the_same_as_those_that_may():
    waiting, swift = decode(new_core(), MIXED), decode(new_core(), MIXED, careful=False)
    assert any(len(r.latent_ids) < 12 for r in waiting[:12]), "somebody should leave latent mode"
    for a, b in zip(waiting, swift, strict=True):
        assert a.exact
        assert b.exact
        assert_equal(a, b)


def test_settings_are_each_samples_own():
    together = decode(new_core(), MIXED)
    for number, request in enumerate(MIXED):
        core = new_core()
        rows = settings_of(request, True)
        for position, settings in enumerate(rows):
            uid = number * 4 + position
            core.add(uid, PROMPT, settings)
            slot = np.array([core.slots[uid]])
            for step in range(12):
                core.draw(logits_at(uid, step)[None], slot, torch.tensor([PROMPT - 1 + step]), torch.tensor([True]))
            assert_equal(core.take([uid], [12]).records()[0], together[uid])


def test_what_cannot_be_known_from_the_likeliest_ids_is_marked():
    """All ids alike: the selected ones depend on the noise of every id, and 128 of 400 were looked at."""
    careful, swift = decode(new_core(), MIXED, scale=0.0), decode(new_core(), MIXED, careful=False, scale=0.0)
    assert all(r.exact for r in careful)
    assert not any(r.exact for r in swift)


def test_a_step_too_many_that_is_not_exact_leaves_the_record_exact():
    core, request = new_core(), group(1, mode="visible", top_p=1.0)
    (settings,) = settings_of(request, careful=False)
    core.add(0, PROMPT, settings)
    core.add(1, PROMPT, settings)
    slots = np.array([core.slots[0], core.slots[1]])
    for step, scale in enumerate((30.0, 30.0, 0.0)):  # the last one is flat: any id may be drawn
        core.draw(torch.stack([logits_at(0, step, scale)] * 2), slots, torch.full((2,), PROMPT - 1 + step))
    before, after = core.look([0, 1], [2, 3]).records()
    assert before.exact
    assert not after.exact
    core.fork(0, {2: 5, 3: 6}, 2)
    assert all(record.exact for record in core.look([2, 3], [2, 2]).records())
    core.fork(1, {4: 7}, 3)
    assert not core.look([4], [3]).records()[0].exact


@pytest.mark.parametrize("wait", [lambda t: t[0].item(), lambda t: bool(t[0] > 0), lambda t: t.cpu(), torch.nonzero])
def test_a_function_that_waits_is_found(wait):
    with pytest.raises(AssertionError, match="would wait"), Without(WAITING):
        wait(torch.ones(2))
    with pytest.raises(AssertionError, match="would wait"), Without(COPYING):
        torch.as_tensor(0.95)


def test_the_draws_contain_nothing_that_waits_for_the_device():
    core = new_core()
    rows = [s for request in MIXED for s in settings_of(request, False)]
    slots = np.array([core.add(uid, PROMPT, settings) for uid, settings in enumerate(rows)])
    embedding = torch.randn(VOCAB, 8)
    for step in range(3):
        positions = torch.full((16,), PROMPT - 1 + step)
        with Without(WAITING):
            core.draw(torch.randn(16, VOCAB), slots, positions, torch.ones(16, dtype=torch.bool))
            places, owners = core.generated_rows(slots, np.full(16, PROMPT + step), np.arange(17))
            inputs = torch.zeros(16, 8)
            core.feed(inputs, places, owners, torch.full((16,), PROMPT + step), lambda ids: embedding[ids])


@pytest.mark.parametrize("settings", [{}, {"top_p": 0.8, "k": 7}])
def test_rows_with_and_without_noise_side_by_side_copy_nothing_to_the_device(settings):
    """Same k and same top_p for all, so these are numbers of the host."""
    core = new_core()
    mixed = [group(samples=2, noise_mode=mode, **settings) for mode in ("one_sided", "off", "two_sided")]
    rows = [s for request in mixed for s in settings_of(request, False)]
    slots = np.array([core.add(uid, PROMPT, row) for uid, row in enumerate(rows)])
    for step in range(3):
        positions = torch.full((6,), PROMPT - 1 + step)
        with Without(COPYING):
            core.draw(torch.randn(6, VOCAB), slots, positions, torch.ones(6, dtype=torch.bool))


def test_a_step_that_is_drawn_again_replaces_the_one_that_was_thrown_away():
    """vLLM runs ahead, and recomputes after preemption: later steps are overwritten, earlier ones stay."""
    reference = decode(new_core(), [group()])
    core, settings = new_core(), settings_of(group(), True)
    for uid in range(4):
        core.add(uid, PROMPT, settings[uid])
    slots = np.array([core.slots[uid] for uid in range(4)])
    order = [0, 1, 2, 3, 4, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 8, 9, 10, 11]
    for step in order:
        logits = torch.stack([logits_at(uid, step) for uid in range(4)])
        core.draw(logits, slots, torch.full((4,), PROMPT - 1 + step), torch.ones(4, dtype=torch.bool))
    for a, b in zip(core.take(range(4), [12] * 4).records(), reference, strict=True):
        assert_equal(a, b)


def test_a_step_that_leaves_latent_mode_only_when_drawn_again_ends_the_latent_steps():
    """Other weights in flight: what had been drawn behind it, and thrown away, is no history any more."""
    core, (settings,) = new_core(), settings_of(group(samples=1, max_tokens=6), True)
    slot, complete = np.array([core.add(0, PROMPT, settings)]), torch.tensor([True])

    def draw(step, leave=False):
        logits = logits_at(0, step + 100) - 30 * (torch.arange(VOCAB) == END)
        logits[END] += 100 * leave
        core.draw(logits[None], slot, torch.tensor([PROMPT - 1 + step]), complete)

    for step in range(5):
        draw(step)
    draw(2, leave=True)
    for step in (3, 4, 5):
        draw(step)
    record = core.take([0], [6]).records()[0]
    assert len(record.latent_ids) == 2
    assert record.hard_ids[0] == END
    assert len(record.hard_ids) == 4


def test_a_sample_that_comes_back_after_preemption_keeps_its_history():
    core, settings = new_core(), settings_of(group(), True)[2]
    slot = np.array([core.add(2, PROMPT, settings)])
    for step in range(12):
        if step == 2:
            assert core.add(2, PROMPT, settings) == slot[0]
        core.draw(logits_at(2, step)[None], slot, torch.tensor([PROMPT - 1 + step]), torch.tensor([True]))
    assert_equal(core.take([2], [12]).records()[0], decode(new_core(), [group()])[2])


def test_incomplete_prompts_draw_nothing():
    for careful in (True, False):
        records = []
        for disturbed in (False, True):
            core, (settings,) = new_core(), settings_of(group(samples=1), careful)
            slot = np.array([core.add(0, PROMPT, settings)])
            core.draw(logits_at(0, 0)[None], slot, torch.tensor([PROMPT - 1]), torch.tensor([True]))
            if disturbed:
                core.draw(logits_at(0, 9)[None], slot, torch.tensor([1]), torch.tensor([False]))
            records += core.take([0], [1]).records()
        assert len(records[0].latent_ids) == 1
        assert_equal(*records)


def test_mixtures_are_fed_where_a_step_was_latent_and_nowhere_else():
    core = new_core()
    latent, visible = (
        settings_of(group(samples=1, tau=0.5), True)[0],
        settings_of(group(samples=1, mode="visible"), True)[0],
    )
    slots = np.array([core.add(1, PROMPT, latent), core.add(2, 2, visible)])
    for step in range(2):
        logits = torch.stack([logits_at(1, step), logits_at(2, step)])
        core.draw(logits, slots, torch.tensor([PROMPT - 1 + step, 1 + step]), torch.tensor([True, True]))
    embedding, inputs = torch.randn(VOCAB, 8), torch.randn(8, 8)
    before = inputs.clone()
    # request 1: its last prompt token and two response steps; request 2: all of four
    computed, query_start = np.array([PROMPT - 1, 0]), np.array([0, 3, 7])
    positions = torch.tensor([2, 3, 4, 0, 1, 2, 3, 0])
    places, owners = core.generated_rows(slots, computed, query_start)
    assert places.tolist() == [1, 2, 5, 6]
    core.feed(inputs, places, owners, positions, lambda ids: embedding[ids])
    record = core.take([1], [2]).records()[0]
    assert len(record.latent_ids) == 2
    for place, step in ((1, 0), (2, 1)):
        weights = torch.softmax(torch.tensor(record.latent_scores[step]) / 0.5, -1)
        want = mix_embeddings(embedding[torch.tensor(record.latent_ids[step]).long()], weights)
        torch.testing.assert_close(inputs[place], want)
    untouched = [0, 3, 4, 5, 6, 7]
    assert torch.equal(inputs[untouched], before[untouched])


def test_slots_grow_and_are_freed():
    core = new_core(slots=2)
    settings = settings_of(group(samples=9), True)
    for uid in range(9):
        core.add(uid, PROMPT, settings[uid])
    assert SCRATCH not in core.slots.values()
    assert len(set(core.slots.values())) == 9
    core.forget([0, 3, 77])
    assert len(core.slots) == 7
    slots = np.array([core.slots[1]])
    core.draw(logits_at(1, 0)[None], slots, torch.tensor([PROMPT - 1]), torch.tensor([True]))
    core.take([1], [1])
    core.forget(list(core.slots))
    assert not core.slots


def test_samples_of_the_expected_size_take_no_more_memory_than_the_start():
    core = new_core(slots=16, steps=12, width=5)
    assert core.record_bytes == 17 * 12 * 5 * 12, "the formula of docs/vllm.md"
    assert_equal(decode(core, MIXED)[3], decode(new_core(), MIXED)[3])
    assert core.record_bytes == 17 * 12 * 5 * 12
    decode(core, [group(k=6)])
    assert core.record_bytes > 17 * 12 * 5 * 12, "wider records than were expected take more"


def test_records_come_in_one_copy_from_the_device():
    core = new_core()
    for uid, settings in enumerate(settings_of(group(), False)):
        core.add(uid, PROMPT, settings)
    slots = np.array([core.slots[uid] for uid in range(4)])
    for step in range(12):
        logits = torch.stack([logits_at(uid, step) for uid in range(4)])
        core.draw(logits, slots, torch.full((4,), PROMPT - 1 + step), torch.ones(4, dtype=torch.bool))
    with Without(WAITING):
        fetch = core.take(range(4), [12] * 4)
    with Without(WAITING - {"numpy"}) as seen:
        assert len(fetch.records()) == 4
    assert seen.calls["numpy"] == 1


def test_a_warm_up_of_requests_that_nobody_added_is_harmless():
    core = new_core()
    core.draw(torch.randn(4, VOCAB), np.zeros(4, dtype=np.int64), torch.full((4,), 99), torch.ones(4, dtype=torch.bool))


def test_block_names_are_shared_in_the_prompt_and_the_requests_own_behind_it():
    @dataclasses.dataclass
    class Request:
        request_id: str
        num_prompt_tokens: int
        block_hashes: list

    hasher = keep_histories_apart(lambda request: [b"one", b"two", b"three"], block_size=4)
    a, b = hasher(Request("a", 9, [])), hasher(Request("b", 9, []))
    assert a[:2] == b[:2] == [b"one", b"two"]
    assert a[2] != b[2]
    later = hasher(Request("a", 9, [b"x"]))
    assert later[0] == b"one"
    assert later[1] not in (b"two", a[1])
    assert hasher(Request("a", 8, []))[1] == b"two", "a block that ends with the prompt holds nothing generated"


@pytest.mark.parametrize(
    ("change", "message"),
    [({"max_tokens": 0}, "do not fit"), ({"k": 0}, "allowed ids"), ({"top_k": -1}, "top_k >= 0")],
)
def test_refusals_name_what_was_received(change, message):
    facts = TokenFacts(
        vocab_size=VOCAB, allowed=np.ones(VOCAB, bool), latent_end_id=END, eos_ids=(1,), pad_id=0
    )  # fmt: skip
    version = PolicyVersion(version=0, checksum="")
    assert admit(group(), facts, version, max_rows=8, max_length=64).size == 4
    with pytest.raises(RequestRefused, match=re.escape(message)):
        admit(group(**change), facts, version, max_rows=8, max_length=64)
