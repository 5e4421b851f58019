"""The group buffer's invariants: slots bound staleness, batches come in prompt order, nothing is used twice."""

import itertools
import operator
import random

import numpy as np
import pytest

from latent_grpo.common.types import GroupRequest, SamplingSettings
from latent_grpo.deploy.buffer import GroupBuffer, TooManyDispatched


def request(ordinal):
    return GroupRequest(
        group_uid=f"g{ordinal}",
        problem_uid=f"t/{ordinal}",
        task="t",
        prompt_ids=np.zeros(1, np.int32),
        sample_indices=(0, 1),
        sampling=SamplingSettings(mode="latent", max_tokens=4),
        purpose="training",
        epoch=0,
        run_seed=0,
        verifier="math",
        gold_answer="1",
    )


def buffer(prompts=4, staleness=0, refill=True, factor=50):
    """Groups are plain ordinals here: the buffer never looks inside."""
    return GroupBuffer(
        prompts_per_step=prompts,
        max_staleness=staleness,
        refill=refill,
        max_dispatch_factor=factor,
    )


def fill(b):
    ordinals = b.next_ordinals
    assert [b.dispatched(request(ordinal)) for ordinal in ordinals] == ordinals
    return ordinals


def run(b, batches, order, late=lambda ordinal: False, keeps=lambda ordinal: True):
    """Dispatches while slots are free, lets groups arrive in an arbitrary order, trains each batch at once."""
    taken, waiting = [], []
    while len(taken) < batches:
        waiting += fill(b)
        batch = b.take_batch()
        if batch is not None:
            taken.append(batch)
            b.trained(batch)
            continue
        ordinal = order.choice([o for o in waiting if not late(o)] or waiting)
        waiting.remove(ordinal)
        b.arrived(f"g{ordinal}", ordinal, None if keeps(ordinal) else "all_equal")
    return taken


@pytest.mark.parametrize("staleness", [0, 1, 2])
@pytest.mark.parametrize("refill", [True, False])
def test_batches_do_not_depend_on_arrival_order(staleness, refill):
    results = {
        tuple(
            (batch.ordinals, batch.next_ordinal)
            for batch in run(buffer(4, staleness, refill), 5, random.Random(seed), keeps=lambda g: g % 3 != 1)
        )
        for seed in range(5)
    }
    assert len(results) == 1


def test_refill_takes_the_first_groups_with_signal_and_wastes_none():
    batches = run(buffer(4, 0, True), 3, random.Random(0), keeps=lambda g: g % 2 == 0)
    kept = list(itertools.chain.from_iterable(b.ordinals for b in batches))
    assert kept == [0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22]
    assert batches[0].dropped == {"all_equal": 3}


def test_drop_trains_on_what_has_signal_and_may_be_empty():
    batches = run(buffer(4, 0, False), 2, random.Random(0), keeps=lambda g: g >= 4)
    assert batches[0].ordinals == ()
    assert batches[1].ordinals == (4, 5, 6, 7)


def test_synchronous_training_dispatches_nothing_while_the_learner_trains():
    b = buffer(4, 0)
    for ordinal in fill(b):
        b.arrived(f"g{ordinal}", ordinal)
    batch = b.take_batch()
    assert b.free_slots == 0
    b.trained(batch)
    assert b.free_slots == 4


def test_one_step_of_staleness_allows_one_more_batch_in_flight():
    b = buffer(4, 1)
    ordinals = fill(b)
    assert len(ordinals) == 8
    for ordinal in ordinals[:4]:
        b.arrived(f"g{ordinal}", ordinal)
    batch = b.take_batch()
    assert b.free_slots == 0  # 4 in training, 4 in flight
    b.trained(batch)
    assert b.free_slots == 4


def test_a_slow_group_holds_its_batch_and_is_not_overtaken():
    b = buffer(2, 1)
    fill(b)
    for ordinal in (1, 2, 3):
        b.arrived(f"g{ordinal}", ordinal)
    assert b.take_batch() is None
    b.arrived("g0", 0)
    assert b.take_batch().ordinals == (0, 1)


def test_a_duplicate_is_recognised_and_dropped():
    b = buffer(2)
    fill(b)
    assert b.arrived("g0", 0) is None
    assert b.arrived("g0", 0) == "duplicate"
    assert b.arrived("unknown", 9) == "duplicate"
    assert b.arrived("unknown", None, "malformed") == "duplicate"
    assert b.duplicates == 3


def test_a_task_without_signal_ends_in_a_clear_error():
    b = buffer(2, factor=3)
    with pytest.raises(TooManyDispatched, match=r"6 groups .*all_equal"):
        run(b, 1, random.Random(0), keeps=lambda g: False)


# --- the window --------------------------------------------------------------------------------------------------


def windowed(window, next_ordinal=0, ahead=(), refill=True):
    return GroupBuffer(
        prompts_per_step=4, max_staleness=2, refill=refill, max_dispatch_factor=50, window=window,
        next_ordinal=next_ordinal, ahead=ahead,
    )  # fmt: skip


def run_late(b, batches, order, keeps=lambda ordinal: True):
    """As `run`, but every seventh group arrives only when nothing else is under way."""
    return run(b, batches, order, lambda ordinal: ordinal % 7 == 0, keeps)


@pytest.mark.parametrize("refill", [True, False])
@pytest.mark.parametrize("window", [0, 1, 4])
@pytest.mark.parametrize("seed", range(4))
def test_no_group_is_lost_or_taken_twice_or_comes_more_than_the_window_early_or_a_batch_late(window, seed, refill):
    signal = lambda group: group % 3 != 1  # noqa: E731
    batches = run_late(windowed(window, refill=refill), 12, random.Random(seed), signal)
    trained = [o for batch in batches for o in batch.ordinals]
    generated = [g for batch in batches for g in batch.generated]
    assert len(generated) == len(set(generated))
    consumed = set(range(batches[-1].next_ordinal)) | set(batches[-1].ahead)
    assert sorted(trained) == sorted(o for o in consumed if signal(o))
    batch_of = {o: number for number, batch in enumerate(batches) for o in batch.ordinals}
    ordered = sorted(trained)  # those that a batch has taken: an index in it is a place of the strict order, or before
    assert max(ordered.index(o) - place for place, o in enumerate(trained)) <= window
    for number, batch in enumerate(batches):
        waited = [o for o in batch.ordinals if number and o < max(batches[number - 1].ahead, default=-1)]
        assert [o for o, by in zip(batch.ordinals, batch.passed, strict=True) if by] == waited
        # what a batch has passed over is in the next one
        assert all(batch_of[o] <= number + 1 for o in trained if o < max(batch.ahead, default=-1))
    passed = sum(by for batch in batches for by in batch.passed)
    if window == 0:
        assert trained == sorted(trained)
    assert (passed > 0) is (window > 0), "without a group passed over the test shows nothing"


def test_a_window_of_zero_is_the_strict_order():
    strict = run(buffer(4, 2, True), 8, random.Random(1), keeps=lambda g: g % 3 != 1)
    late = run_late(windowed(0), 8, random.Random(2), lambda g: g % 3 != 1)
    of = operator.attrgetter("ordinals", "generated", "reasons", "next_ordinal", "ahead")
    assert list(map(of, late)) == list(map(of, strict))


def test_a_run_that_goes_on_takes_what_was_passed_over_and_nothing_again():
    batches = run_late(windowed(4), 12, random.Random(0))
    cuts = [number for number, batch in enumerate(batches) if batch.ahead]
    assert len(cuts) > 3, "nothing was passed over, so the test shows nothing"
    for cut in cuts:
        last = batches[cut]
        left = [o for o in range(last.next_ordinal, max(last.ahead)) if o not in last.ahead]
        goes_on = windowed(4, next_ordinal=last.next_ordinal, ahead=last.ahead)
        rest = run_late(goes_on, 6, random.Random(9))
        trained = [o for batch in (*batches[: cut + 1], *rest) for o in batch.ordinals]
        assert sorted(trained) == sorted(set(range(rest[-1].next_ordinal)) | set(rest[-1].ahead))
        assert list(rest[0].ordinals[: len(left)]) == left, "the next batch waits for what was passed over"
        assert rest[0].passed[: len(left)] == (True,) * len(left)
