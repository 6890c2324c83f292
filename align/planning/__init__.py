"""Predict what a run takes before anything is loaded: memory by role and phase, graphics cards, disk, time."""
