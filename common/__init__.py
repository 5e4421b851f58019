"""What both services share; imports nothing of the other packages."""

__version__ = "0.2.0"
