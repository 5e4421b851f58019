"""Audits of responses and of gold answers (`latent-grpo grade`)."""
