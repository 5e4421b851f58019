"""`latent-grpo grade`: audits of responses and of gold answers."""
