"""Checks before a run: a profile (`validate`), this machine (`doctor`) and the build of torch."""
