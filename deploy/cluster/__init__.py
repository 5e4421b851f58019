"""Jobs on a Ray cluster, and the files that make a cluster with KubeRay or Slurm from an image."""
