"""Suites, which run the arms of a study over seeds as units and write one report with verdicts."""
