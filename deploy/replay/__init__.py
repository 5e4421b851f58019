"""A recorded step of the learner, computed again from its dump."""
