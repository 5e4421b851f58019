"""Jobs on a Ray cluster, and the files that make such a cluster with KubeRay, Slurm or an image."""
