"""Rollout engines and the Ray actors round them."""
