"""Faults of what the user gave."""


class ConfigError(ValueError):
    """A setting that cannot work. The message says what was received, what is allowed and what to change."""
