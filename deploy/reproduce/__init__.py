"""Suites: the arms of a study over seeds, run as units, and one report with verdicts."""
