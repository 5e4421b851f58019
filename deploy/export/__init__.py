"""The export of a run's model: a Hugging Face folder with its card, on this machine or on the hub."""
