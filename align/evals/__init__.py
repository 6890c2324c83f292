"""Measuring a policy against what it started from: statistics, text figures, and the comparison they make up."""
