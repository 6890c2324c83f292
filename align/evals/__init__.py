"""Evaluation: judges, suites of tasks, statistics, figures on held-out data."""
