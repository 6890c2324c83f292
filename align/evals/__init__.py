"""Evaluation: judges, suites of tasks, statistics, and figures on held-out data."""
