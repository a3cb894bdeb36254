"""Judges: they measure and aggregate, nothing else."""
