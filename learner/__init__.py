"""The learner: advantages, objective, replayed log-probs, ZeRO ranks, checkpoints and publication."""
