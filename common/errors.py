"""Faults of what the user gave."""


class ConfigError(ValueError):
    """A setting that cannot work. The message says what was received, what is allowed and what to change."""


class MetricsError(RuntimeError):
    """A sink that cannot work, or the record that cannot be written; the message says what to do."""
