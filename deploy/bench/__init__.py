"""Benchmarks of single parts, run by `latent-grpo bench`; each prints what it measured and does not judge it."""
