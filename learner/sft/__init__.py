"""Latent-SFT on the learner's ranks: rows, soft labels, the loss, and stage 1 (METHOD §7)."""
