"""Prediction of a run's memory for each model role and phase, the GPUs it fits on, its disk space and its time."""
