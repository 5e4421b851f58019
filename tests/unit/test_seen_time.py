"""Deadlines count only what somebody has watched."""

from latent_grpo.common.seen_time import SeenTime


class Hand:
    now = 100.0

    def __call__(self):
        return self.now


def test_waits_that_were_asked_for_count_and_time_away_does_not():
    hand = Hand()
    clock = SeenTime(hand)
    hand.now += 5
    assert clock.look(5.0) == 5.0
    hand.now += 3600  # the driver was stopped
    assert clock.look(5.0) == 11.0  # the wait, and a second of grace
    hand.now += 0.25
    assert clock.look() == 11.25
