"""Replay: a recorded step of the learner is computed again from its dump."""
