"""After an interrupt the running step is either finished whole or left alone."""

from __future__ import annotations

from deploy.interrupts import settled


class Learner:
    """A step that ends after so many looks."""

    def __init__(self, looks):
        self.looks, self.collected = looks, 0

    def finished(self):
        self.looks -= 1
        return self.looks <= 0

    def finish_step(self):
        self.collected += 1
        return {}


def test_a_running_step_is_waited_for_and_collected_once():
    learner = Learner(looks=3)
    assert settled(learner, seconds=60)
    assert learner.collected == 1


def test_a_step_that_takes_too_long_is_not_collected():
    learner = Learner(looks=10**9)
    assert not settled(learner, seconds=0.0)
    assert learner.collected == 0
