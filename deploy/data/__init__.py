"""The data sets of benchmarks and training: what there is, and how it comes into the data folder."""
