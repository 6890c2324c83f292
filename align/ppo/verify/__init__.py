"""Checks of PPO: its formulas against independent numbers, and its loop on the user's own model."""
