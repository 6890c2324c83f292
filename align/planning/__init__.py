"""Prediction of a run's memory by role and phase, of the GPUs that it fits on, its disk space and its time."""
