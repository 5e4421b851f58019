"""The controller and everything round it: the command line, runs, evaluation, suites, cluster files."""
