"""The parts that both services share. It imports nothing from the other packages."""

__version__ = "0.2.0"
