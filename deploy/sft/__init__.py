"""The loops of Latent-SFT (METHOD §7), as a command and as the warm start of a run."""
