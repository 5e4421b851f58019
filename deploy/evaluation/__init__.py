"""Evaluation: pass@1, pass@k, chain length and invalid rate, with intervals (METHOD §8)."""
