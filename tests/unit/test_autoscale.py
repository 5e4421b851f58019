"""Autoscaling against a simulated run, whose best number of workers is known."""

import pytest

from latent_grpo.deploy.run.autoscale import Autoscaler


def settled(*, start, work_s, learning_s, overlaps, most=32, least=1, tail_s=0.0, steps=400):
    """The numbers of workers of a simulated run: `work_s` seconds of rollouts a step, shared by the workers, after
    which the longest group takes `tail_s` more; with `overlaps` they run beside the learner's work."""
    scaler, workers, seen = Autoscaler(least, most, overlaps=overlaps), start, [start]
    for _ in range(steps):
        rollouts = work_s / workers + tail_s
        waited = max(rollouts - learning_s, 0.0) if overlaps else rollouts
        workers = scaler.after(waited + learning_s, waited, work_s, serving=workers, wanted=workers)
        seen.append(workers)
    return seen


def test_beside_the_learner_there_are_as_many_workers_as_keep_it_busy():
    """64 s of rollouts beside 8 s of learning: 8 workers; more would idle."""
    for start in (1, 4, 32):
        seen = settled(start=start, work_s=64.0, learning_s=8.0, overlaps=True)
        assert 7 <= seen[-1] <= 8, seen[-1]
        assert len(set(seen[-50:])) == 1  # no flapping


def test_in_turns_with_the_learner_workers_are_added_while_they_save_a_tenth():
    seen = settled(start=1, work_s=64.0, learning_s=8.0, overlaps=False)
    n = seen[-1]
    step = 64 / n + 8
    more = n + max(n // 4, 1)
    assert 64 / n - 64 / more < 0.1 * step
    assert len(set(seen[-50:])) == 1
    assert seen == sorted(seen)


def test_workers_that_only_wait_for_the_longest_group_are_not_added():
    assert settled(start=4, work_s=4.0, learning_s=1.0, overlaps=False, tail_s=30.0)[-1] <= 4


def test_the_bounds_hold():
    assert settled(start=2, work_s=900.0, learning_s=1.0, overlaps=True, most=5)[-1] == 5
    assert settled(start=4, work_s=0.1, learning_s=20.0, overlaps=True, least=3)[-1] == 3


def test_nothing_is_decided_while_workers_are_on_their_way():
    scaler = Autoscaler(1, 8, overlaps=True)
    assert [scaler.after(20.0, 15.0, 20.0, serving=1, wanted=2) for _ in range(9)] == [2] * 9


@pytest.mark.parametrize("overlaps", [False, True])
def test_short_steps_are_looked_at_together(overlaps):
    """Workers tell of their work every two seconds, so a short step alone says nothing."""
    scaler = Autoscaler(1, 8, overlaps=overlaps)
    wanted = [scaler.after(0.5, 0.4, 2.4 if step % 4 == 0 else 0.0, serving=1, wanted=1) for step in range(19)]
    assert wanted == [1] * 19
    assert scaler.after(0.5, 0.4, 0.0, serving=1, wanted=1) == 2
