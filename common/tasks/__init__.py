"""Where problems come from: files, hub datasets, the benchmarks and the generated task."""
