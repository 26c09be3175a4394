"""Clusters and cloud machines from a laptop: Cloud TPU (gcloud), GKE (xpk) and SLURM (sbatch).

Nothing in here imports jax, so that it starts fast and needs no accelerator.
"""
