"""Judges: who compares or grades answers, what they say, and how far they can be believed."""
