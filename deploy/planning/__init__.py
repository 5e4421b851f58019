"""What a run will need and how long it will take, before anything starts: `latent-grpo plan`."""
