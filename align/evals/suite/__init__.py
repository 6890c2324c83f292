"""Suites of evaluation tasks: systems, their answers, scores, results and gates."""
