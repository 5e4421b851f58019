"""The controller and what surrounds it: the command line, runs, evaluation, suites and cluster files."""
