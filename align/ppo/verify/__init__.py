"""Checks of PPO's formulas against independently computed numbers, and of its training code on the user's own model."""
