"""Rollout engines and the Ray actors around them."""
